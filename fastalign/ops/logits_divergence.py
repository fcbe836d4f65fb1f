"""Divergence of two next-token distributions from logits that already exist, some rows at a time.

The arithmetic is that of `head/divergence_terms.py`, on whole rows. Forward saves five numbers per row. Backward
reads the logits a second time to form the gradient, in their memory if `in_place`. Top to bottom: schema, kernels,
fakes, autograd, and the public function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.errors import InputError
from fastalign.ops.backends import pick
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head.checks import (
    check_devices,
    check_divergence,
    check_floating,
    check_per_token,
    check_vocabulary,
)
from fastalign.ops.head.divergence_terms import RULED_OUT, DivergenceKind, LogSumExp, gradient, terms
from fastalign.ops.head.rows import counting_mask
from fastalign.ops.head.tiling import START, unmasked_rows
from fastalign.ops.head.transform import LogitTransform
from fastalign.reference import Divergence

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch")
# The logits are given: there is nothing left to transform, and the temperature is divided out beforehand.
_NO_TRANSFORM = LogitTransform()

_library = torch.library.Library("fastalign", "FRAGMENT")
_OPTIONS = "Tensor? mask, str divergence, float temperature, float jsd_beta"
_library.define(f"logits_divergence(Tensor student, Tensor teacher, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    f"logits_divergence_backward(Tensor grad, Tensor student, Tensor teacher, Tensor stats, {_OPTIONS}) -> Tensor"
)
_library.define(
    f"logits_divergence_backward_(Tensor grad, Tensor(a!) student, Tensor teacher, Tensor stats, {_OPTIONS}) -> ()"
)


def _scaled_logits(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Some unmasked rows at a time: their numbers, both sides' logits over temperature, and two scratch tiles.

    The logits are copies in float32 or float64.
    """
    blocks, dtype = unmasked_rows(student, mask), reference.compute_dtype(student, teacher)
    spare = student.new_empty(2, len(blocks[0]), student.shape[1], dtype=dtype)
    for rows in blocks:
        a, b = (t[rows].to(dtype).div_(temperature).clamp_(min=START) for t in (student, teacher))
        yield rows, a, b, (spare[0, : len(a)], spare[1, : len(a)])


def without_entries(top: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
    """Which rows (R,) of logits (N, V) are -inf throughout: they have no distribution, and their divergence is NaN.

    top: (R,) the largest of each row's logits over temperature, at least START. So on a CPU the logits themselves are
    read only where a row may be one of those. A GPU reads them always: to look at `low` would make the host wait.
    """
    low = top <= START
    if low.device.type == "cpu" and not low.any():
        return low
    return low & logits[rows].amax(1).isneginf()


def _logits_divergence(student, teacher, mask, divergence, temperature, jsd_beta):
    dtype, kind = reference.compute_dtype(student, teacher), DivergenceKind(divergence, jsd_beta)
    values = student.new_zeros(len(student), dtype=dtype)
    stats = values.new_zeros(len(student), 5)
    for rows, a, b, scratch in _scaled_logits(student, teacher, mask, temperature):
        # Columns of stats: maximum and log-sum of the student, then of the teacher, then the moment K.
        for i, (z, logits) in enumerate(((a, student), (b, teacher))):
            sums = LogSumExp(len(z), z)
            sums.absorb(z, scratch[0])
            nothing = without_entries(sums.top, logits, rows)
            stats[rows, 2 * i], stats[rows, 2 * i + 1] = sums.top, sums.total.log().masked_fill_(nothing, math.nan)
        value, moment = terms(a, b, stats[rows], kind, _NO_TRANSFORM, scratch)
        values[rows] = value.masked_fill_(value > RULED_OUT, float("inf"))
        stats[rows, 4] = 0.0 if moment is None else moment
    return values, stats


def _gradient_into(out, grad, student, teacher, stats, mask, divergence, temperature, jsd_beta) -> None:
    """The gradient in the student's logits (N, V) into `out`, which may be those logits."""
    kind = DivergenceKind(divergence, jsd_beta)
    scale = grad.to(stats.dtype).unsqueeze(1) / temperature
    for rows, a, b, scratch in _scaled_logits(student, teacher, mask, temperature):
        terms(a, b, stats[rows], kind, _NO_TRANSFORM, scratch)
        out[rows] = gradient(a, b, stats[rows, 4], kind, _NO_TRANSFORM).mul_(scale[rows]).to(out.dtype)
    if mask is not None:
        out[~mask] = 0.0


def _logits_divergence_backward(grad, student, teacher, stats, mask, divergence, temperature, jsd_beta):
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    _gradient_into(out, grad, student, teacher, stats, mask, divergence, temperature, jsd_beta)
    return out


def _logits_divergence_backward_(grad, student, teacher, stats, mask, divergence, temperature, jsd_beta):
    _gradient_into(student, grad, student, teacher, stats, mask, divergence, temperature, jsd_beta)


for _op in (_logits_divergence, _logits_divergence_backward, _logits_divergence_backward_):
    _library.impl(_op.__name__.removeprefix("_"), _op, "CompositeExplicitAutograd")


@torch.library.register_fake("fastalign::logits_divergence", lib=_library)
def _fake(student, teacher, mask, divergence, temperature, jsd_beta):
    values = student.new_empty(student.shape[0], dtype=reference.compute_dtype(student, teacher))
    return values, values.new_empty(student.shape[0], 5)


@torch.library.register_fake("fastalign::logits_divergence_backward", lib=_library)
def _backward_fake(grad, student, teacher, stats, mask, divergence, temperature, jsd_beta):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastalign::logits_divergence_backward_", lib=_library)
def _backward_in_place_fake(grad, student, teacher, stats, mask, divergence, temperature, jsd_beta):
    return None


class _LogitsDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, mask, divergence, temperature, jsd_beta, in_place):
        ctx.options, ctx.in_place = (divergence, temperature, jsd_beta), in_place
        values, stats = torch.ops.fastalign.logits_divergence(student, teacher, mask, *ctx.options)
        ctx.save_for_backward(student, teacher, stats, mask)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        student, teacher, stats, mask = ctx.saved_tensors
        if ctx.in_place:
            student = student.detach()  # it shares the version counter, so autograd notices the change
            torch.ops.fastalign.logits_divergence_backward_(grad, student, teacher, stats, mask, *ctx.options)
            return student, *[None] * 6
        found = torch.ops.fastalign.logits_divergence_backward(grad, student, teacher, stats, mask, *ctx.options)
        return found, *[None] * 6


def logits_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution from the teacher's, per token, from both models' logits.

    It is `linear_divergence` for callers that have logits already: "forward_kl" `KL(t || s)`, "reverse_kl"
    `KL(s || t)`, "jsd" with `m = jsd_beta t + (1 - jsd_beta) s`, of the softmax at `temperature`, in nats. It is
    differentiable (once) in the student's logits.

    Args:
        student_logits: (..., V) floating.
        teacher_logits: (..., U) floating. Only the first min(V, U) entries count, so vocabularies may differ by
            padding. Neither side is copied for that.
        mask: (...) bool. Rows where it is False are not read, return 0 and get zero gradient.
        token_weights: (...) floating constants that multiply the divergences. Rows of weight 0 are not read either.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        temperature: Divides the logits of both sides; above 0.
        jsd_beta: The teacher's share in m, between 0 and 1.
        inplace_backward: Whether the backward pass overwrites the student's logits with their gradient, instead of
            allocating a second tensor of that size. It is meant for logits that nothing else reads afterwards. Autograd
            raises where another backward pass needs them. It has no effect under torch.compile, nor on logits that are
            not contiguous.
        backend: "torch" (some rows at a time), "reference", or "auto".

    Returns:
        (...) float32, or float64 for float64 logits.

    Raises:
        InputError: A shape, dtype, device or option does not fit.
        BackendError: The backend is unknown.
    """
    check_divergence(divergence, temperature, jsd_beta)
    _check_logits(student_logits, teacher_logits)
    check_per_token(mask, token_weights, student_logits.shape[:-1])
    check_devices(student_logits, teacher_logits, mask, token_weights)
    student_logits, teacher_logits = _cut_to_shared_vocabulary(student_logits, teacher_logits)
    backend = pick.resolve("logits_divergence", backend, student_logits, backends=BACKENDS)
    weights = None if token_weights is None else token_weights.detach()
    mask = counting_mask(mask, weights)
    if backend == "reference":
        values = reference.logits_divergence(
            student_logits, teacher_logits.detach(), divergence=divergence, temperature=temperature, jsd_beta=jsd_beta
        )
        values = values if mask is None else values.masked_fill(~mask, 0.0)
        return values if weights is None else values * weights.to(values.dtype)
    in_place = inplace_backward and not torch.compiler.is_compiling() and student_logits.is_contiguous()
    vocab = student_logits.shape[-1]
    values = _LogitsDivergence.apply(
        student_logits.reshape(-1, vocab), teacher_logits.detach().reshape(-1, vocab),
        None if mask is None else mask.reshape(-1), divergence, float(temperature), float(jsd_beta), in_place,
    )  # fmt: skip
    values = values.view(student_logits.shape[:-1])
    return values if weights is None else values * weights.to(values.dtype)


def _cut_to_shared_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The entries that both sides have. A side that need not be cut stays the same tensor, for an in-place gradient."""
    vocab = min(student.shape[-1], teacher.shape[-1])
    return (
        student if student.shape[-1] == vocab else student[..., :vocab],
        teacher if teacher.shape[-1] == vocab else teacher[..., :vocab],
    )


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    for name, t in (("student_logits", student), ("teacher_logits", teacher)):
        check_floating(name, t, f"call {name}.float()")
        check_vocabulary(name, t.shape, t.shape[-1] if t.dim() else 0)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise InputError(
            f"student_logits is {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)}; they must hold the "
            "same tokens: (..., V) and (..., U)"
        )
