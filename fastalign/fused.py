"""Drop-in losses from hidden states: loss o segment_sum o linear_logprobs, with no `[tokens, vocabulary]` logits.

    from fastalign import fused_linear_dpo
    out = fused_linear_dpo(hidden, lm_head.weight, targets, ref_logps=ref_logps, beta=0.1)
    out.loss.backward()

**Two layouts.** Padded: `hidden (2B, T, H)` and `targets (2B, T)`, the B chosen rows first, then the B rejected ones
in the same order. Packed: `hidden (S, H)`, `targets (S,)` and `cu_seqlens (2B + 1,)`, chosen and rejected alternating:
c0 r0 c1 r1 ... Losses of single completions take `(B, T, H)`, or packed rows with `cu_seqlens (B + 1,)`.

**The shift is the caller's.** `targets[..., t]` is the token that `hidden[..., t]` predicts: the *next* one. From a
model's `input_ids` of the same length, pass `hidden[:, :-1]` and `input_ids[:, 1:]`. Prompt and padding positions get
`ignore_index` and cost nothing; None says that there are none.

**The reference**, where a loss needs one: `ref_logps`, a log-probability sum per sequence in the order of the rows, or
`ref_hidden` of a reference model at the same positions, with its `ref_weight` and `ref_bias` (the policy's own head
where no ref_weight is given), scored here without gradients.

Every function also takes linear_logprobs's `bias`, `logit_scale`, `softcap`, `temperature`, `ignore_index`,
`memory_budget` and `backend`. InputError names whatever does not fit.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses import (
    LENGTH_NORMALISED,
    PAIRWISE,
    REFERENCE_FREE,
    bco,
    canonical,
    implicit_rewards,
    kto,
    pairwise_loss,
)
from fastalign.ops import linear_logprobs, segment_sum


class PreferenceOutput(NamedTuple):
    """The loss over B pairs, and what it was made of. Only `loss` carries gradients."""

    loss: Tensor  # () mean over pairs, plus nll_weight * nll
    chosen_logps: Tensor  # (B,) sums over the completion's tokens
    rejected_logps: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,) beta * (logps - reference's logps), or beta * logps without a reference
    rejected_rewards: Tensor  # (B,)
    nll: Tensor  # () mean over the chosen tokens, or over those of nll_targets


class UnpairedOutput(NamedTuple):
    """The loss over B single completions, and what it was made of. Only `loss` carries gradients."""

    loss: Tensor  # () mean over completions
    logps: Tensor  # (B,) sums over the completion's tokens
    rewards: Tensor  # (B,) beta * (logps - reference's logps)


def fused_linear_preference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_type: str | Sequence[str] = "dpo",
    loss_weights: Sequence[float] | None = None,
    length_normalised: Collection[str] = LENGTH_NORMALISED,
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
    backend: str = "auto",
    **loss_options: float,
) -> PreferenceOutput:
    """Mean over pairs of `sum_k loss_weights[k] loss_type[k](pair)`, plus `nll_weight` times the NLL of the chosen.

    hidden, weight (V, H), targets, cu_seqlens, ref_*: see the head of this file. `loss_type` is a name in
    fastalign.losses.PAIRWISE, TRL's name for one, or several of these for a mixture (MPO, arXiv:2411.10442); those in
    `length_normalised` get averages per token, all others sums. `loss_options` (beta, label_smoothing, ...) are the
    losses' own.

    The NLL (RPO's, CPO's and ORPO's second term) is the mean over the tokens of the chosen completions. Pass
    `nll_targets`, shaped like targets, to take it over more, such as prompt and completion: it holds the tokens to
    count in the chosen rows (rejected rows are not read), and agrees with targets where both are set.
    """
    head = {
        "logit_scale": logit_scale, "softcap": softcap, "temperature": temperature, "ignore_index": ignore_index,
        "memory_budget": memory_budget, "backend": backend,
    }  # fmt: skip
    names = [canonical(name) for name in ([loss_type] if isinstance(loss_type, str) else loss_type)]
    _check_options(names, loss_options)
    bounds = _bounds(hidden, targets, cu_seqlens, group=2)
    scored = have_target(targets, ignore_index)
    lengths = segment_sum(scored.flatten().float(), bounds)
    pairs = lengths.shape[0] // 2
    if cu_seqlens is None:
        first, second = slice(0, pairs), slice(pairs, None)
    else:
        first, second = slice(0, None, 2), slice(1, None, 2)
    wanted, counted = _nll_tokens(targets, nll_targets, first, bounds, ignore_index)

    logprobs = linear_logprobs(hidden, weight, wanted, bias=bias, **head)
    sums = segment_sum(logprobs.masked_fill(~scored, 0.0).flatten(), bounds)
    nll = -logprobs.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)

    ref = None
    if not REFERENCE_FREE.issuperset(names):
        ref_head = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
        ref = _reference_sums(sums, targets, bounds, ref_logps, ref_hidden, *ref_head, head)
    elif ref_logps is not None or ref_hidden is not None:
        raise InputError(f"ref_logps or ref_hidden is given, but {names} take no reference; leave it out")
    losses = pairwise_loss(
        names, loss_weights, sums[first], sums[second], *((None, None) if ref is None else (ref[first], ref[second])),
        lengths_chosen=lengths[first], lengths_rejected=lengths[second], options=loss_options,
        length_normalised=length_normalised,
    )  # fmt: skip
    loss = losses.mean() + nll_weight * nll if nll_weight else losses.mean()
    beta = loss_options.get("beta", PAIRWISE[names[0]].__kwdefaults__["beta"])
    sums = sums.detach()
    rewards = implicit_rewards(sums, torch.zeros_like(sums) if ref is None else ref, beta)
    return PreferenceOutput(loss, sums[first], sums[second], rewards[first], rewards[second], nll.detach())


def have_target(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Which positions have a target: all of them where ignore_index is None."""
    # `targets != None` is no tensor, but a bool
    return torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index


def _check_options(names: list[str], options: dict) -> None:
    """Each option must be one that a loss in `names` takes: a misspelt one must not go unused."""
    known = sorted({key for name in names for key in PAIRWISE[name].__kwdefaults__})
    for option in options:
        if option not in known:
            nearest = difflib.get_close_matches(option, [*known, *fused_linear_preference.__kwdefaults__], n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"its options are {', '.join(known)}."
            raise InputError(f"option {option!r} is not one of {', '.join(names)}; {hint}")


def _bounds(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None, group: int) -> Tensor:
    """Offsets of the sequences into the flattened targets, `group` of them to an item: 2 for pairs."""
    rows, packed = ("2B", "(2B + 1,)") if group == 2 else ("B", "(B + 1,)")
    if targets.shape != hidden.shape[:-1] or targets.dim() != (2 if cu_seqlens is None else 1):
        raise InputError(
            f"hidden is {tuple(hidden.shape)}, targets {tuple(targets.shape)} and cu_seqlens "
            f"{'None' if cu_seqlens is None else tuple(cu_seqlens.shape)}; give padded ({rows}, T, H) and ({rows}, T) "
            f"without cu_seqlens, or packed (S, H) and (S,) with cu_seqlens {packed}"
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
    if targets.device.type == "cpu" and differing.any():
        raise InputError(
            f"nll_targets differs from targets at {int(differing.sum())} chosen tokens; both are the token that the "
            "hidden state predicts: build both from the same input_ids, shifted alike"
        )
    return torch.where(counted, nll_targets, targets), counted


def _reference_sums(sums, targets, bounds, ref_logps, ref_hidden, weight, bias, head) -> Tensor:
    """The reference's log-probability of each sequence, detached, in the dtype of the policy's `sums`."""
    if (ref_logps is None) == (ref_hidden is None):
        found = "ref_logps and ref_hidden are both " + ("None" if ref_logps is None else "given")
        raise InputError(f"{found}; this loss needs a reference: pass one of them")
    if ref_logps is not None:
        if ref_logps.shape != sums.shape or ref_logps.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"ref_logps is {tuple(ref_logps.shape)} {ref_logps.dtype}; it must be {tuple(sums.shape)}, one sum of "
                "log-probabilities per sequence, in float32 or float64"
            )
        return ref_logps.detach().to(sums.dtype)
    with torch.no_grad():
        logprobs = linear_logprobs(ref_hidden, weight, targets, bias=bias, **head)
        return segment_sum(logprobs.flatten(), bounds).to(sums.dtype)


def fused_linear_dpo(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Direct preference optimisation (arXiv:2305.18290). Options: beta, label_smoothing (conservative DPO), and those
    of fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="dpo", **options)


def fused_linear_ipo(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Identity preference optimisation (arXiv:2310.12036), on averages per token as its authors and TRL run it;
    `length_normalised=()` gives the paper's sums. Options: beta, and those of fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="ipo", **options)


def fused_linear_hinge(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """SLiC's hinge on log-ratios (arXiv:2305.10425, arXiv:2309.06657). Options: beta, and those of
    fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="hinge", **options)


def fused_linear_robust(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Robust DPO under flipped labels (arXiv:2403.00409). Options: beta, label_smoothing, and those of
    fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="robust", **options)


def fused_linear_exo(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Efficient exact optimisation (arXiv:2402.00856). Options: beta, label_smoothing above 0, and those of
    fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="exo", **options)


def fused_linear_nca(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Noise contrastive alignment (arXiv:2402.05369). Options: beta, and those of fused_linear_preference."""
    return fused_linear_preference(hidden, weight, targets, loss_type="nca", **options)


def fused_linear_sppo(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Self-play preference optimisation, hard wins (arXiv:2405.00675). Options: beta, and those of
    fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="sppo", **options)


def fused_linear_apo_zero(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Anchored preference optimisation, chosen up and rejected down (arXiv:2408.06266). Options: beta, and those of
    fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="apo_zero", **options)


def fused_linear_apo_down(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Anchored preference optimisation, both down (arXiv:2408.06266). Options: beta, and those of
    fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="apo_down", **options)


def fused_linear_aot(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Alignment via optimal transport, paired (arXiv:2406.05882); sorts over the batch. Options: beta,
    label_smoothing, and those of fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="aot", **options)


def fused_linear_discopop(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """The discovered, log-ratio modulated loss (arXiv:2406.08414). Options: beta, discopop_tau, and those of
    fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="discopop", **options)


def fused_linear_bco_pair(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Binary classifier optimisation on pairs (arXiv:2404.04656). Options: beta, delta (the reward shift), and those
    of fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="bco_pair", **options)


def fused_linear_simpo(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> PreferenceOutput:
    """Simple preference optimisation, on averages per token, no reference (arXiv:2405.14734). Options: beta,
    gamma_beta_ratio, label_smoothing, and those of fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="simpo", **options)


def fused_linear_cpo(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, nll_weight: float = 1.0, **options
) -> PreferenceOutput:
    """Contrastive preference optimisation with its NLL term, no reference (arXiv:2401.08417). Options: beta,
    label_smoothing, and those of fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="cpo", nll_weight=nll_weight, **options)


def fused_linear_orpo(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, nll_weight: float = 1.0, **options
) -> PreferenceOutput:
    """NLL plus beta times the odds ratio term, no reference (arXiv:2403.07691). The NLL is over the chosen completion;
    with `nll_targets` (prompt and completion) it is the paper authors' and TRL's. Options: beta (the paper's lambda),
    and those of fused_linear_preference.
    """
    return fused_linear_preference(hidden, weight, targets, loss_type="orpo", nll_weight=nll_weight, **options)


def fused_linear_kto(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    labels: Tensor,
    *,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
    **options,
) -> UnpairedOutput:
    """Kahneman-Tversky optimisation (arXiv:2402.01306) of B completions with labels (B,) bool, True for desirable.

    `kl` is the reference point of fastalign.losses.kto_baseline; `weights` are those of desirable and undesirable
    completions. Options: cu_seqlens (B + 1,), ref_logps (B,) or ref_hidden with ref_weight and ref_bias, and those of
    linear_logprobs.
    """
    logps, ref = _policy_and_reference_sums(hidden, weight, targets, **options)
    loss = kto(logps, ref, labels, kl, beta=beta, weights=weights).mean()
    return UnpairedOutput(loss, logps.detach(), implicit_rewards(logps, ref, beta))


def fused_linear_bco(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    labels: Tensor,
    *,
    delta: float | Tensor = 0.0,
    beta: float = 0.1,
    **options,
) -> UnpairedOutput:
    """Binary classifier optimisation (arXiv:2404.04656) of B completions with labels (B,) bool, True for desirable.

    `delta` is the reward shift, half the sum of the running mean rewards of either label. Options as for
    fused_linear_kto.
    """
    logps, ref = _policy_and_reference_sums(hidden, weight, targets, **options)
    loss = bco(logps, ref, labels, delta, beta=beta).mean()
    return UnpairedOutput(loss, logps.detach(), implicit_rewards(logps, ref, beta))


def _policy_and_reference_sums(
    hidden, weight, targets, *, cu_seqlens=None, bias=None, ref_logps=None, ref_hidden=None, ref_weight=None,
    ref_bias=None, **head,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bounds = _bounds(hidden, targets, cu_seqlens, group=1)
    sums = segment_sum(linear_logprobs(hidden, weight, targets, bias=bias, **head).flatten(), bounds)
    ref_head = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
    return sums, _reference_sums(sums, targets, bounds, ref_logps, ref_hidden, *ref_head, head)


def fused_linear_sft(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, num_items: float | Tensor | None = None, **options
) -> Tensor:
    """Negative log-likelihood, summed over the tokens that are not ignored and divided by `num_items`: a scalar.

    hidden (..., H), weight (V, H), targets (...). `num_items` is the number of such tokens in the whole accumulated
    batch, so that micro-batches add up to its mean; None counts this one's. Options are those of linear_logprobs.
    """
    if num_items is None:
        num_items = have_target(targets, options.get("ignore_index", -100)).sum().clamp(min=1)
    return -linear_logprobs(hidden, weight, targets, **options).sum() / num_items
