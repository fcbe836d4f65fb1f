"""Preference losses from token log-probabilities in one launch: segment sum, loss and derivative fused.

The losses are defined in `fastalign.losses`. This file maps those that a kernel can compute to five forms with three
numbers each, so a kernel needs to know only the five forms. Top to bottom: the forms, schema, kernels, fakes, autograd,
and the public function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.errors import InputError
from fastalign.losses import PAIRWISE, UNPAIRED, canonical, log1mexp, options_of, pairwise_loss
from fastalign.losses.checks import check_logprobs
from fastalign.ops.backends import pick
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head.checks import check_devices
from fastalign.ops.offsets import as_offsets, check_offsets

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch", "cpu", "triton", "cuda")


class Form(IntEnum):
    """The form of a loss.

    With u and v the log-ratios of chosen and rejected, s the sigmoid, and x = scale (u - v) - offset:

    LOGISTIC  -log s(x) + slope x
    SQUARE    x^2
    HINGE     max(0, -x)
    ODDS      -scale log s(logit(u) - logit(v)) with logit(a) = a - log(1 - exp(a))
    KTO       offset s(-scale (u - kl)) where desirable, slope s(scale (u - kl)) where not
    """

    LOGISTIC = 0
    SQUARE = 1
    HINGE = 2
    ODDS = 3
    KTO = 4


class Formula(NamedTuple):
    """A loss as the kernels take it: its form and the form's numbers."""

    form: Form
    scale: float
    offset: float = 0.0
    slope: float = 0.0


# Smoothed labels: -(1 - eps) log s(x) - eps log s(-x) = -log s(x) + eps x, since log s(-x) = log s(x) - x.
FORMULAS: dict[str, Callable[..., Formula]] = {
    "dpo": lambda beta, label_smoothing: Formula(Form.LOGISTIC, beta, 0.0, label_smoothing),
    "dpo_norm": lambda beta, label_smoothing: Formula(Form.LOGISTIC, beta, 0.0, label_smoothing),
    "cpo": lambda beta, label_smoothing: Formula(Form.LOGISTIC, beta, 0.0, label_smoothing),
    "simpo": lambda beta, gamma_beta_ratio, label_smoothing: Formula(
        Form.LOGISTIC, beta, beta * gamma_beta_ratio, label_smoothing
    ),
    "robust": lambda beta, label_smoothing: Formula(
        Form.LOGISTIC, beta, 0.0, -label_smoothing / (1 - 2 * label_smoothing)
    ),
    "ipo": lambda beta: Formula(Form.SQUARE, 1.0, 1 / (2 * beta)),
    "ipo_tau": lambda beta, tau: Formula(Form.SQUARE, beta, tau),
    "hinge": lambda beta: Formula(Form.HINGE, beta, 1.0),
    "orpo": lambda beta: Formula(Form.ODDS, beta),
    "kto": lambda beta, weights: Formula(Form.KTO, beta, *weights),
}

_library = torch.library.Library("fastalign", "FRAGMENT")
_library.define(
    "preference_loss(Tensor logprobs, Tensor cu_seqlens, Tensor? ref_sums, Tensor? lengths, Tensor? labels, "
    "Tensor? kl, int form, bool averaged, bool alternating, float beta, float scale, float offset, float slope, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "preference_loss_backward(Tensor? grad_losses, Tensor? grad_sums, Tensor coefficients, Tensor cu_seqlens, "
    "int items, bool alternating, str backend) -> Tensor"
)


def _preference_loss(
    logprobs, cu_seqlens, ref_sums, lengths, labels, kl, form, averaged, alternating, beta, scale, offset, slope,
    backend,
):  # fmt: skip
    if backend in pick.KERNELS:
        return pick.KERNELS[backend].preference_loss(
            logprobs, cu_seqlens, ref_sums, lengths, labels, kl, form, averaged, alternating, beta, scale, offset, slope
        )
    if cu_seqlens.device.type == "cpu":  # on a GPU the check would wait for the offsets
        check_offsets(cu_seqlens, logprobs.shape[0])
    spans = cu_seqlens.diff()
    sums = torch.segment_reduce(logprobs, "sum", offsets=cu_seqlens, axis=0, initial=0.0)
    ratios = sums.clone() if ref_sums is None else sums - ref_sums
    rewards = beta * ratios
    if averaged:
        lengths = (spans.to(sums.dtype) if lengths is None else lengths).clamp(min=1)
        ratios = ratios / lengths
    formula = Formula(Form(form), scale, offset, slope)
    if labels is None:
        (chosen, rejected), pairs = _split(ratios, alternating), ratios.shape[0] // 2
        losses, slopes = _pair_loss(chosen, rejected, formula)
        slopes = torch.stack(slopes, 1 if alternating else 0).view(2 * pairs)
    else:
        losses, slopes = _labelled_loss(ratios - kl, labels, formula)
    coefficients = slopes / lengths if averaged else slopes
    return losses, rewards, sums, coefficients.repeat_interleave(spans, output_size=logprobs.shape[0])


def _split(values: Tensor, alternating: bool) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) of values (2B,), one per sequence."""
    if alternating:
        return values[0::2], values[1::2]
    pairs = values.shape[0] // 2
    return values[:pairs], values[pairs:]


def _pair_loss(u: Tensor, v: Tensor, formula: Formula) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Losses (B,), and their derivatives in u and in v."""
    form, scale, offset, slope = formula
    if form == Form.ODDS:
        below_zero = -torch.finfo(u.dtype).tiny
        a, b = u.clamp(max=below_zero), v.clamp(max=below_zero)
        log_miss_a, log_miss_b = log1mexp(a), log1mexp(b)
        log_odds_ratio = (a - b) - (log_miss_a - log_miss_b)
        # s(-x) / (1 - e^a) is formed from logarithms: either factor may leave the dtype's range, the result does not.
        falling = F.logsigmoid(-log_odds_ratio)
        d_u = (-scale * (falling - log_miss_a).exp()).masked_fill(u > below_zero, 0.0)
        d_v = (scale * (falling - log_miss_b).exp()).masked_fill(v > below_zero, 0.0)
        return -scale * F.logsigmoid(log_odds_ratio), (d_u, d_v)
    x = scale * (u - v) - offset  # every other form is a function of the margin alone
    if form == Form.SQUARE:
        losses, d_x = x.square(), 2 * x
    elif form == Form.HINGE:
        losses, d_x = torch.relu(-x), -(x < 0).to(x.dtype)
    else:
        losses, d_x = slope * x - F.logsigmoid(x), slope - torch.sigmoid(-x)
    return losses, (scale * d_x, -scale * d_x)


def _labelled_loss(u: Tensor, labels: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """Losses (B,), and their derivatives in u."""
    _, scale, desirable, undesirable = formula
    sign = torch.full_like(u, -1.0).masked_fill(labels, 1.0)
    weight = torch.full_like(u, undesirable).masked_fill(labels, desirable)
    x = scale * sign * u
    falling = torch.sigmoid(-x)
    return weight * falling, -weight * sign * scale * falling * torch.sigmoid(x)


def _preference_loss_fake(
    logprobs, cu_seqlens, ref_sums, lengths, labels, kl, form, averaged, alternating, beta, scale, offset, slope,
    backend,
):  # fmt: skip
    sequences = cu_seqlens.shape[0] - 1
    items = sequences // 2 if labels is None else sequences
    return tuple(logprobs.new_empty(count) for count in (items, sequences, sequences, logprobs.shape[0]))


def _preference_loss_backward(grad_losses, grad_sums, coefficients, cu_seqlens, items, alternating, backend):
    if backend in pick.KERNELS:
        run = pick.KERNELS[backend].preference_loss_backward
        return run(grad_losses, grad_sums, coefficients, cu_seqlens, items, alternating)
    spans, tokens = cu_seqlens.diff(), coefficients.shape[0]
    out = torch.zeros_like(coefficients)
    if grad_losses is not None:
        if items != spans.shape[0]:
            grad_losses = grad_losses.repeat_interleave(2) if alternating else grad_losses.repeat(2)
        out = coefficients * grad_losses.repeat_interleave(spans, output_size=tokens)
    return out if grad_sums is None else out + grad_sums.repeat_interleave(spans, output_size=tokens)


def _preference_loss_backward_fake(grad_losses, grad_sums, coefficients, cu_seqlens, items, alternating, backend):
    return torch.empty_like(coefficients)


_library.impl("preference_loss", _preference_loss, "CompositeExplicitAutograd")
_library.impl("preference_loss_backward", _preference_loss_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastalign::preference_loss", _preference_loss_fake, lib=_library)
torch.library.register_fake("fastalign::preference_loss_backward", _preference_loss_backward_fake, lib=_library)


class _PreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, cu_seqlens, alternating, backend, *others):
        ref_sums, lengths, labels, kl, averaged, beta, formula = others
        out = torch.ops.fastalign.preference_loss(
            logprobs, cu_seqlens, ref_sums, lengths, labels, kl, formula[0], averaged, alternating, beta, *formula[1:],
            backend,
        )  # fmt: skip
        losses, rewards, _, coefficients = out
        ctx.save_for_backward(coefficients, cu_seqlens)
        ctx.items, ctx.alternating, ctx.backend = losses.shape[0], alternating, backend
        ctx.mark_non_differentiable(rewards, coefficients)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, _, grad_sums, __):
        coefficients, cu_seqlens = ctx.saved_tensors
        grad = None
        if grad_losses is not None or grad_sums is not None:
            grad = torch.ops.fastalign.preference_loss_backward(
                grad_losses, grad_sums, coefficients, cu_seqlens, ctx.items, ctx.alternating, ctx.backend
            )
        return grad, *[None] * 10


class PreferenceLosses(NamedTuple):
    """What `preference_loss` returns. Only `losses` and `sums` carry gradients.

    Attributes:
        losses: (B,) one per pair, or per completion for kto.
        rewards: (2B,), or (B,) for kto: beta * (sums - ref_sums), or beta * sums without a reference.
        sums: (2B,), or (B,) for kto: the log-probability of each sequence in nats.
        coefficients: (S,) d losses[b] / d logprobs[t], where b is the pair (or completion) that token t belongs to.
    """

    losses: Tensor
    rewards: Tensor
    sums: Tensor
    coefficients: Tensor


def preference_loss(
    logprobs: Tensor,
    cu_seqlens: Tensor,
    ref_sums: Tensor | None = None,
    *,
    loss_type: str = "dpo",
    averaged: bool | None = None,
    lengths: Tensor | None = None,
    alternating: bool = True,
    labels: Tensor | None = None,
    kl: float | Tensor = 0.0,
    backend: Backend = "auto",
    **options: float,
) -> PreferenceLosses:
    """The loss of each pair from the log-probabilities of its tokens: `losses.<loss_type>` o `segment_sum`.

    Args:
        logprobs: (S,) float32 or float64, of the tokens of packed sequences.
        cu_seqlens: (2B + 1,) int64 or int32 offsets, rising from 0 to S. Chosen and rejected alternate, or with
            `alternating=False` all chosen come first and then all rejected. For "kto": (B + 1,).
        ref_sums: (2B,) sums of the reference model in that order, for the losses that take one.
        loss_type: A key of FORMULAS, or TRL's name for it.
        averaged: Whether the loss is given averages per token instead of sums; None: as LENGTH_NORMALISED says.
        lengths: (2B,) the tokens to divide by, where not every token counts. An empty sequence has the average 0.
        alternating: See cu_seqlens.
        labels: (B,) bool, True for desirable; only "kto" takes them, whose sequences are single completions.
        kl: The reference point of `kto_baseline`, for "kto".
        backend: One of
            "cpu": C++, in float64 between input and output;
            "triton", "cuda": on a GPU, float32 only. Offsets that do not fit give NaN, since looking at them would wait
            for the GPU;
            "torch": any device;
            "reference": the losses and autograd;
            "auto": on a GPU "cuda", else "triton", for float32; on the CPU "cpu" where it is built; else "torch".
        **options: beta, label_smoothing, ... (for "kto" also weights): those of the function of that name in
            `fastalign.losses`, which holds formula and paper.

    Returns:
        Losses, rewards, sums and coefficients. ref_sums and kl get no gradient.

    Raises:
        InputError: A shape, dtype, device, offset or option does not fit.
        BackendError: There is no such backend, or the backend that was named cannot run.
    """
    name = loss_type if loss_type == "kto" else canonical(loss_type)
    if name not in FORMULAS:
        raise InputError(f"loss_type is {loss_type!r}; preference_loss has {', '.join(FORMULAS)}: use pairwise_loss")
    settings = _complete_options(name, options_of(name), options)
    averaged = (name != "kto" and PAIRWISE[name].averaged) if averaged is None else averaged
    cu_seqlens = as_offsets(cu_seqlens)
    _check_tensors(logprobs, cu_seqlens, ref_sums, lengths, labels, name)
    check_logprobs(settings["beta"], settings.get("label_smoothing", 0.0), logprobs=logprobs)
    backend = pick.resolve(
        "preference_loss", backend, logprobs, cpu_kernel="preference_loss_f32", only_if_fast=False
    )  # fmt: skip
    if labels is not None:
        if not isinstance(kl, Tensor):
            kl = logprobs.new_full((1,), kl)  # filled on the device: a copy from the host would wait for it
        kl = kl.detach().to(logprobs).reshape(1)
    if ref_sums is not None:
        ref_sums = ref_sums.detach()
    if backend == "reference":
        return _by_definition(
            logprobs, cu_seqlens, ref_sums, lengths, labels, kl, name, averaged, alternating, settings
        )
    return PreferenceLosses(
        *_PreferenceLoss.apply(
            logprobs, cu_seqlens, alternating, backend, ref_sums, lengths, labels, kl if labels is not None else None,
            averaged, float(settings["beta"]), FORMULAS[name](**settings),
        )
    )  # fmt: skip


def _complete_options(name: str, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The loss's options with its defaults; InputError for one that it lacks, or for a number that is not finite."""
    for key, value in given.items():
        if key not in defaults:
            raise InputError(f"option {key!r} is not one of {name}; its options are {', '.join(sorted(defaults))}.")
        for number in value if key == "weights" else (value,):
            if not math.isfinite(number) or (key == "weights" and number < 0):
                raise InputError(f"{key} is {value!r}; expected finite numbers, and weights of at least 0.")
    return {**defaults, **given}


def _check_tensors(logprobs, cu_seqlens, ref_sums, lengths, labels, name) -> None:
    if logprobs.dim() != 1 or logprobs.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"logprobs is {tuple(logprobs.shape)} {logprobs.dtype}; it must be (S,) float32 or float64, as "
            "linear_logprobs returns it"
        )
    sequences = cu_seqlens.numel() - 1
    if name != "kto" and sequences % 2:
        raise InputError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)}; it must be (2B + 1,) offsets from 0 to S={logprobs.shape[0]}, "
            "two sequences for each of B pairs"
        )
    if (labels is None) == (name == "kto"):
        raise InputError(f"labels is {'None' if labels is None else 'given'} for {name!r}; only kto takes them")
    if labels is not None and (labels.shape != (sequences,) or labels.dtype != torch.bool):
        raise InputError(f"labels is {tuple(labels.shape)} {labels.dtype}; it must be ({sequences},) bool")
    takes_reference = name == "kto" or PAIRWISE[name].reference
    if (ref_sums is not None) != takes_reference:
        found, remedy = ("None", "needs one") if ref_sums is None else ("given", "takes none: leave it out")
        raise InputError(f"ref_sums is {found}; {name!r} {remedy}: the reference's log-probability of each sequence")
    for what, tensor in (("ref_sums", ref_sums), ("lengths", lengths)):
        if tensor is not None and (tensor.shape != (sequences,) or tensor.dtype != logprobs.dtype):
            raise InputError(
                f"{what} is {tuple(tensor.shape)} {tensor.dtype}; it must be ({sequences},) {logprobs.dtype}"
            )
    check_devices(logprobs, cu_seqlens, ref_sums, lengths, labels)


def _by_definition(
    logprobs, cu_seqlens, ref_sums, lengths, labels, kl, name, averaged, alternating, options
) -> PreferenceLosses:
    """The loss functions and autograd."""
    check_offsets(cu_seqlens, logprobs.shape[0])
    with torch.enable_grad():
        leaf = logprobs if logprobs.requires_grad else logprobs.detach().requires_grad_()
        sums = reference.segment_sum(leaf, cu_seqlens)
        lengths = cu_seqlens.diff().to(sums.dtype) if lengths is None else lengths
        if labels is None:
            both = [_split(t, alternating) for t in (sums, ref_sums, lengths) if t is not None]
            losses = pairwise_loss(
                name, None, *both[0], *(both[1] if ref_sums is not None else ()), lengths_chosen=both[-1][0],
                lengths_rejected=both[-1][1], options=options, length_normalised={name} if averaged else (),
            )  # fmt: skip
        else:
            scale = lengths.clamp(min=1) if averaged else 1.0
            losses = UNPAIRED[name](sums / scale, ref_sums / scale, labels, kl[0], **options)
        (coefficients,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
    if not logprobs.requires_grad or not torch.is_grad_enabled():
        losses, sums = losses.detach(), sums.detach()
    ratios = sums.detach() if ref_sums is None else sums.detach() - ref_sums
    return PreferenceLosses(losses, options["beta"] * ratios, sums, coefficients)
