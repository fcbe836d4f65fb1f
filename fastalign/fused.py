"""Drop-in losses from hidden states, which never hold the `[tokens, vocabulary]` logits.

    from fastalign import fused_linear_dpo
    out = fused_linear_dpo(hidden, lm_head.weight, targets, ref_logps=ref_logps, beta=0.1)
    out.loss.backward()

Each call is three steps: `linear_logprobs` per token, `segment_sum` per sequence, and the loss. Every loss in
`fastalign.losses` has its function `fused_linear_<loss>` here, with the options of the loss and the arguments of
`fused_linear_preference`. These functions are made from the table of losses.

**Two layouts.**

- Padded: `hidden (2B, T, H)` and `targets (2B, T)`. The B chosen rows come first, then the B rejected ones in the same
  order.
- Packed: `hidden (S, H)`, `targets (S,)` and `cu_seqlens (2B + 1,)`, chosen and rejected alternating: c0 r0 c1 r1 ...

Losses of single completions take `(B, T, H)`, or packed rows with `cu_seqlens (B + 1,)`.

**The caller shifts.** `targets[..., t]` is the token that `hidden[..., t]` predicts, which is the *next* one. From a
model's `input_ids` of the same length, pass `hidden[:, :-1]` and `input_ids[:, 1:]`. Unshifted `input_ids` have the
right shape too, so no error can tell. Prompt and padding positions get `ignore_index` and cost nothing.

**The reference**, where a loss needs one, is given in one of two ways:

- `ref_logps`: a log-probability sum per sequence, in the order of the rows.
- `ref_hidden`: the hidden states of a reference model at the same positions, with its `ref_weight` and `ref_bias`. They
  are scored here without gradients. Without `ref_weight` the policy's output layer scores them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses import PAIRWISE, UNPAIRED, canonical, implicit_rewards, loss_function, options_of, pairwise_loss
from fastalign.ops import linear_logprobs, segment_sum
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head.checks import shift_hint
from fastalign.options import nearest

_PREFIX = "fused_linear_"


class PreferenceOutput(NamedTuple):
    """The loss over B pairs, and what it was made of. Only `loss` carries gradients.

    Attributes:
        loss: () the mean over pairs, plus nll_weight * nll.
        chosen_logps: (B,) log-probabilities of the chosen completions in nats, summed over their tokens.
        rejected_logps: (B,) those of the rejected completions.
        chosen_rewards: (B,) beta * (logps - the reference's logps), or beta * logps without a reference.
        rejected_rewards: (B,) those of the rejected completions.
        nll: () the mean over the chosen tokens, or over those of nll_targets, in nats per token.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    nll: Tensor


class UnpairedOutput(NamedTuple):
    """The loss over B single completions, and what it was made of. Only `loss` carries gradients.

    Attributes:
        loss: () the mean over completions.
        logps: (B,) log-probabilities in nats, summed over each completion's tokens.
        rewards: (B,) beta * (logps - the reference's logps).
    """

    loss: Tensor
    logps: Tensor
    rewards: Tensor


def fused_linear_preference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_type: str | Sequence[str] = "dpo",
    loss_weights: Sequence[float] | None = None,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
    **loss_options: Any,
) -> PreferenceOutput:
    """A loss over pairs, or a weighted mixture of several, from hidden states.

        loss = mean over pairs of sum_k loss_weights[k] * loss_type[k](pair), plus nll_weight * nll

    The head of this file describes the two layouts, the shift of the targets and the reference.

    Args:
        hidden: (2B, T, H) hidden states, or (S, H) packed.
        weight: (V, H) weight of the output layer.
        targets: (2B, T) or (S,) int64; `targets[..., t]` is the token that `hidden[..., t]` predicts.
        loss_type: A name in `fastalign.losses.PAIRWISE`, TRL's name for one, or several of these for a mixture.
        loss_weights: One weight per loss; None: 1 each.
        length_normalised: Names of the losses that are given averages per token instead of sums; None: those that the
            table of losses says.
        cu_seqlens: (2B + 1,) int64 or int32 offsets of packed sequences, rising from 0 to S; None where padded.
        bias: (V,) bias of the output layer.
        ref_logps: (2B,) float32 or float64 log-probability sums under the reference.
        ref_hidden: Hidden states of the reference, like `hidden`, instead of `ref_logps`.
        ref_weight: The reference's output layer; None: `weight`, and then `bias` too.
        ref_bias: The bias of `ref_weight`.
        nll_weight: Weight of the NLL (the second term of RPO, CPO and ORPO): the mean over the tokens of the chosen
            completions, in nats.
        nll_targets: Shaped like `targets`, to take the NLL over more tokens, such as prompt and completion. It holds
            the tokens to count in the chosen rows, and agrees with `targets` where both are set. Its rejected rows are
            not read.
        logit_scale: Factor of the logits.
        softcap: c in `c * tanh(logits / c)`; None: no cap.
        temperature: What the logits are divided by, after the cap.
        ignore_index: The target of positions that are not scored; None: every position is scored.
        memory_budget: Bytes of probability tiles that are stored for the gradient of a trainable output layer.
        backend: As for `linear_logprobs`.
        **loss_options: The options of the losses: beta, label_smoothing, ...

    Returns:
        The loss with its parts.

    Raises:
        InputError: Shapes, dtypes, options or the reference do not fit.

    References:
        Mixtures (MPO): Wang et al. 2024, arXiv:2411.10442.
    """
    names = [canonical(name) for name in ([loss_type] if isinstance(loss_type, str) else loss_type)]
    _check_options(names, loss_options, fused_linear_preference)
    bounds = _bounds(hidden, targets, cu_seqlens, group=2)
    scored = have_target(targets, ignore_index)
    lengths = segment_sum(scored.flatten().float(), bounds)
    pairs = lengths.shape[0] // 2
    if cu_seqlens is None:
        first, second = slice(0, pairs), slice(pairs, None)
    else:
        first, second = slice(0, None, 2), slice(1, None, 2)
    wanted, counted = _nll_tokens(targets, nll_targets, first, bounds, ignore_index)

    score = partial(
        linear_logprobs, logit_scale=logit_scale, softcap=softcap, temperature=temperature, ignore_index=ignore_index,
        memory_budget=memory_budget, backend=backend,
    )  # fmt: skip
    # One pass over the vocabulary for the tokens of both terms: each masks out the tokens that only the other counts.
    logprobs = score(hidden, weight, wanted, bias=bias)
    sums = segment_sum(logprobs.masked_fill(~scored, 0.0).flatten(), bounds)
    nll = -logprobs.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)

    ref = None
    if any(PAIRWISE[name].reference for name in names):
        ref_layer = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
        ref = _reference_sums(sums, targets, bounds, ref_logps, ref_hidden, *ref_layer, score)
    elif ref_logps is not None or ref_hidden is not None:
        raise InputError(f"ref_logps or ref_hidden is given, but {names} take no reference; leave it out")
    losses = pairwise_loss(
        names, loss_weights, sums[first], sums[second], *((None, None) if ref is None else (ref[first], ref[second])),
        lengths_chosen=lengths[first], lengths_rejected=lengths[second], options=loss_options,
        length_normalised=length_normalised,
    )  # fmt: skip
    loss = losses.mean() + nll_weight * nll if nll_weight else losses.mean()
    beta = loss_options.get("beta", options_of(names[0])["beta"])
    sums = sums.detach()
    rewards = implicit_rewards(sums, torch.zeros_like(sums) if ref is None else ref, beta)
    return PreferenceOutput(loss, sums[first], sums[second], rewards[first], rewards[second], nll.detach())


def _fused_linear_unpaired(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    labels: Tensor,
    *,
    loss_type: str,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
    **loss_options: Any,
) -> UnpairedOutput:
    """The mean of a loss over B completions with labels (B,) bool; `fused_linear_<loss>` is made from it."""
    _check_options([loss_type], loss_options, _fused_linear_unpaired)
    score = partial(
        linear_logprobs, logit_scale=logit_scale, softcap=softcap, temperature=temperature, ignore_index=ignore_index,
        memory_budget=memory_budget, backend=backend,
    )  # fmt: skip
    bounds = _bounds(hidden, targets, cu_seqlens, group=1)
    sums = segment_sum(score(hidden, weight, targets, bias=bias).flatten(), bounds)
    ref_layer = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
    ref = _reference_sums(sums, targets, bounds, ref_logps, ref_hidden, *ref_layer, score)
    loss = UNPAIRED[loss_type](sums, ref, labels, **({_baseline_of(loss_type): 0.0} | loss_options)).mean()
    beta = loss_options.get("beta", options_of(loss_type)["beta"])
    return UnpairedOutput(loss, sums.detach(), implicit_rewards(sums, ref, beta))


def _baseline_of(loss_type: str) -> str:
    """The name of the baseline of a loss over completions, its fourth argument: `kl` of kto, `delta` of bco."""
    return list(inspect.signature(UNPAIRED[loss_type]).parameters)[3]


def fused_linear_sft(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    num_items: float | Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Negative log-likelihood of supervised fine-tuning, from hidden states.

        loss = -sum over scored tokens of log p(target) / num_items

    Args:
        hidden: (..., H) hidden states.
        weight: (V, H) weight of the output layer.
        targets: (...) int64; `targets[..., t]` is the token that `hidden[..., t]` predicts.
        num_items: Number of scored tokens in the whole accumulated batch, so that the losses of micro-batches add up to
            its mean; None: the number in this call.
        bias: (V,) bias of the output layer.
        logit_scale: Factor of the logits.
        softcap: c in `c * tanh(logits / c)`; None: no cap.
        temperature: What the logits are divided by, after the cap.
        ignore_index: The target of positions that are not scored; None: every position is scored.
        memory_budget: Bytes of probability tiles that are stored for the gradient of a trainable output layer.
        backend: As for `linear_logprobs`.

    Returns:
        A scalar, in nats per token.

    Raises:
        InputError: Shapes, dtypes or options do not fit.
    """
    if num_items is None:
        num_items = have_target(targets, ignore_index).sum().clamp(min=1)
    logprobs = linear_logprobs(
        hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
        ignore_index=ignore_index, memory_budget=memory_budget, backend=backend,
    )  # fmt: skip
    return -logprobs.sum() / num_items


def have_target(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Which positions are scored: a bool tensor shaped like `targets`, True everywhere if `ignore_index` is None."""
    # `targets != None` would be the bool True, not a tensor.
    return torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index


def _check_options(names: list[str], options: Iterable[str], call: Callable) -> None:
    """Each option must be one that a loss in `names` takes: a misspelt one must not go unused."""
    known = {option for name in names for option in options_of(name)}
    known |= {_baseline_of(name) for name in names if name in UNPAIRED}
    for option in options:
        if option not in known:
            hint = nearest(option, [*sorted(known), *(call.__kwdefaults__ or {})])
            raise InputError(f"option {option!r} is not one of {', '.join(names)}; {hint}")


def _bounds(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None, group: int) -> Tensor:
    """Offsets of the sequences into the flattened targets. `group` sequences belong together: 2 for pairs."""
    rows, packed = ("2B", "(2B + 1,)") if group == 2 else ("B", "(B + 1,)")
    if targets.shape != hidden.shape[:-1] or targets.dim() != (2 if cu_seqlens is None else 1):
        raise InputError(
            f"hidden is {tuple(hidden.shape)}, targets {tuple(targets.shape)} and cu_seqlens "
            f"{'None' if cu_seqlens is None else tuple(cu_seqlens.shape)}; give padded ({rows}, T, H) and ({rows}, T) "
            f"without cu_seqlens, or packed (S, H) and (S,) with cu_seqlens {packed}"
            + shift_hint(targets.shape, hidden.shape[:-1], "hidden")
        )
    count = targets.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if count < 1 or count % group:
        raise InputError(
            f"there are {count} sequences; give {'a chosen and a rejected one per pair' if group == 2 else 'some'}"
        )
    if cu_seqlens is not None:
        return cu_seqlens
    return torch.arange(count + 1, device=targets.device) * targets.shape[1]


def _nll_tokens(
    targets: Tensor, nll_targets: Tensor | None, chosen: slice, bounds: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """The targets of the loss and the NLL in one tensor, so that no token is projected twice, and the NLL's mask."""
    is_chosen = torch.zeros(bounds.numel() - 1, dtype=torch.bool, device=targets.device)
    is_chosen[chosen] = True
    is_chosen = is_chosen.repeat_interleave(bounds.diff(), output_size=targets.numel()).view(targets.shape)
    scored = have_target(targets, ignore_index)
    if nll_targets is None:
        return targets, is_chosen & scored
    if nll_targets.shape != targets.shape:
        raise InputError(f"nll_targets is {tuple(nll_targets.shape)}; it must be targets' {tuple(targets.shape)}")
    counted = is_chosen & have_target(nll_targets, ignore_index)
    differing = scored & counted & (targets != nll_targets)
    if targets.device.type == "cpu" and differing.any():  # on a GPU, looking at values would wait for it
        raise InputError(
            f"nll_targets differs from targets at {int(differing.sum())} chosen tokens; both are the token that the "
            "hidden state predicts: build both from the same input_ids, shifted alike"
        )
    return torch.where(counted, nll_targets, targets), counted


def _reference_sums(
    sums: Tensor,
    targets: Tensor,
    bounds: Tensor,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    score: Callable[..., Tensor],
) -> Tensor:
    """The reference's log-probability of each sequence, detached, in the dtype of the policy's `sums`."""
    if ref_logps is not None and ref_hidden is None:
        if ref_logps.shape != sums.shape or ref_logps.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"ref_logps is {tuple(ref_logps.shape)} {ref_logps.dtype}; it must be {tuple(sums.shape)}, one sum of "
                "log-probabilities per sequence, in float32 or float64"
            )
        return ref_logps.detach().to(sums.dtype)
    if ref_hidden is not None and ref_logps is None:
        with torch.no_grad():
            return segment_sum(score(ref_hidden, weight, targets, bias=bias).flatten(), bounds).to(sums.dtype)
    found = "ref_logps and ref_hidden are both " + ("None" if ref_logps is None else "given")
    raise InputError(f"{found}; this loss needs a reference: pass one of them")


# The functions of the single losses. They are made from the table when they are first used, so that a loss needs no
# line here. `fused.pyi` shows them to editors and type checkers; a test holds it equal to the signatures made below.


@cache
def _function_of(loss_type: str) -> Callable[..., Any]:
    """`fused_linear_<loss_type>`: the general function with its loss fixed, and a signature that shows the options."""
    if loss_type in UNPAIRED:
        general, defaults = _fused_linear_unpaired, {}
    else:
        general, defaults = fused_linear_preference, {"nll_weight": PAIRWISE[loss_type].nll_weight}

    def function(*args: Any, **options: Any) -> Any:
        return general(*args, loss_type=loss_type, **(defaults | options))

    function.__name__ = function.__qualname__ = _PREFIX + loss_type
    function.__doc__ = _docstring(loss_type)
    # inspect and help() read this attribute, which type checkers do not know of.
    function.__signature__ = _signature(loss_type, general, defaults)  # pyright: ignore[reportFunctionMemberAccess]
    return function


def _signature(loss_type: str, general: Callable[..., Any], defaults: dict[str, Any]) -> inspect.Signature:
    """The general function's signature with the options of the loss in place of `loss_type` and `**loss_options`."""
    left_out = {"loss_type", "loss_weights", "loss_options"}
    options = [p for p in inspect.signature(loss_function(loss_type)).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if loss_type in UNPAIRED:
        baseline = inspect.signature(UNPAIRED[loss_type]).parameters[_baseline_of(loss_type)]
        options.insert(0, baseline.replace(kind=baseline.KEYWORD_ONLY, default=0.0))
    elif not PAIRWISE[loss_type].reference:
        left_out |= {"ref_logps", "ref_hidden", "ref_weight", "ref_bias"}
    signature = inspect.signature(general)
    shared = [p for p in signature.parameters.values() if p.name not in left_out]
    shared = [p.replace(default=defaults.get(p.name, p.default)) for p in shared]
    positional = [p for p in shared if p.kind is p.POSITIONAL_OR_KEYWORD]
    return signature.replace(parameters=[*positional, *options, *shared[len(positional) :]])


def _docstring(loss_type: str) -> str:
    """What the loss is, in the words of its function, and where the arguments are described."""
    loss = loss_function(loss_type)
    what = (inspect.getdoc(loss) or "").partition("\n\nArgs:")[0]
    if loss_type in UNPAIRED:
        how = "the mean over B completions.\n`labels` is (B,) bool, True where the completion is desirable"
    else:
        how = f'the mean over B pairs, as `fused_linear_preference` with `loss_type="{loss_type}"`'
    return (
        f"{what}\n\nComputed from hidden states: {how}.\n`fastalign.losses.{loss.__name__}` describes the options of "
        "the loss and names its paper.\n`fused_linear_preference` describes all other arguments."
    )


def __getattr__(name: str) -> Any:
    """`fused_linear_<loss>` of a loss in the table."""
    loss_type = name.removeprefix(_PREFIX)
    if name.startswith(_PREFIX) and loss_type in [*PAIRWISE, *UNPAIRED]:
        return _function_of(loss_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(_PREFIX + name for name in [*PAIRWISE, *UNPAIRED])})
