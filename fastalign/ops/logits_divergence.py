"""Divergence of two next-token distributions from logits that already exist, some rows at a time.

The arithmetic is that of `divergence_tiles.py`, on whole rows: forward keeps five numbers a row, backward forms the
gradient from the logits again, in their place on request. Schema, fake, autograd and the public function.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.head import divergence_tiles as tiles
from fastalign.ops.head.checks import check_devices, check_divergence_options

BACKENDS = ("auto", "reference", "torch")
# Rows taken at a time fill this many logits of each side, so that no second [tokens, V] float32 tensor ever exists.
_CHUNK = 1 << 21

_library = torch.library.Library("fastalign", "FRAGMENT")
_OPTIONS = "Tensor? mask, str divergence, float temperature, float jsd_beta"
_library.define(f"logits_divergence(Tensor student, Tensor teacher, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    f"logits_divergence_backward(Tensor grad, Tensor student, Tensor teacher, Tensor stats, {_OPTIONS}) -> Tensor"
)
_library.define(
    f"logits_divergence_backward_(Tensor grad, Tensor(a!) student, Tensor teacher, Tensor stats, {_OPTIONS}) -> ()"
)


def _chunks(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float):
    """(rows, the two sides' logits over temperature in float32 or float64, scratch), some unmasked rows at a time."""
    kept = torch.arange(len(student), device=student.device) if mask is None else mask.nonzero().squeeze(1)
    vocab, dtype = student.shape[1], reference.compute_dtype(student, teacher)
    step = max(1, _CHUNK // max(vocab, 1))
    spare = student.new_empty(2, min(step, len(kept)), vocab, dtype=dtype)
    for rows in kept.split(step):
        a, b = (t[rows].to(dtype).clamp_(min=tiles.START).div_(temperature) for t in (student, teacher))
        yield rows, a, b, tuple(spare[:, : len(a)])


def _logits_divergence(student, teacher, mask, divergence, temperature, jsd_beta):
    dtype, kind = reference.compute_dtype(student, teacher), tiles.Divergence(divergence, jsd_beta)
    values = student.new_zeros(len(student), dtype=dtype)
    stats = values.new_zeros(len(student), 5)
    for rows, a, b, scratch in _chunks(student, teacher, mask, temperature):
        for i, z in enumerate((a, b)):
            sums = tiles.LogSumExp(len(z), z)
            sums.absorb(z, scratch[0])
            stats[rows, 2 * i], stats[rows, 2 * i + 1] = sums.top, sums.total.log()
        value, moment = tiles.terms(a, b, stats[rows], kind, tiles.Head(), scratch)
        values[rows] = value.masked_fill_(value > tiles.RULED_OUT, float("inf"))
        stats[rows, 4] = 0.0 if moment is None else moment
    return values, stats


def _gradient_into(out, grad, student, teacher, stats, mask, divergence, temperature, jsd_beta) -> None:
    """The gradient of the logits (N, V) into `out`, which may be the student's logits."""
    kind = tiles.Divergence(divergence, jsd_beta)
    scale = grad.to(stats.dtype).unsqueeze(1) / temperature
    for rows, a, b, scratch in _chunks(student, teacher, mask, temperature):
        tiles.terms(a, b, stats[rows], kind, tiles.Head(), scratch)
        out[rows] = tiles.gradient(a, b, stats[rows, 4], kind, tiles.Head()).mul_(scale[rows]).to(out.dtype)
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
            student = student.detach()  # shares the version counter: whoever saved the logits too is told
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
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution from the teacher's, per token, from both models' logits.

    As `linear_divergence`, for who has logits already: "forward_kl" `KL(t || s)`, "reverse_kl" `KL(s || t)`, "jsd" with
    `m = jsd_beta t + (1 - jsd_beta) s`, of the softmax at `temperature`. Differentiable (once) in the student's logits.

    student_logits, teacher_logits: (..., V) and (..., U) floating; the first min(V, U) entries count, so that
        vocabularies may differ by padding. Neither is copied for it; only longer student logits' gradient is.
    mask: (...) bool. Rows where it is False are not looked at, return 0 and get zero gradient.
    token_weights: (...) floating constants that multiply the divergences; rows of weight 0 are not looked at either.
    inplace_backward: the backward pass overwrites the student's logits with their gradient, instead of allocating a
        second tensor of that size: for logits that nothing else reads afterwards. Autograd raises where another
        backward pass needs them. It has no effect under torch.compile, or on logits that are not contiguous.

    Returns (...) float32, or float64 for float64 logits; computed in that dtype a chunk of rows at a time. InputError
    names a wrong shape, dtype, device or option; BackendError an unknown backend.
    """
    check_divergence_options(divergence, temperature, jsd_beta, None, "auto")
    _check_logits(student_logits, teacher_logits, mask, token_weights)
    student_logits, teacher_logits = _cut_alike(student_logits, teacher_logits)
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; logits_divergence has {', '.join(BACKENDS)}")
    weights = None if token_weights is None else token_weights.detach()
    if weights is not None:
        mask = weights != 0 if mask is None else mask & (weights != 0)
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


def _cut_alike(*logits: Tensor) -> list[Tensor]:
    """Their first entries, as many as both have; what is not cut stays what it is, for a gradient in its place."""
    vocab = min(t.shape[-1] for t in logits)
    return [t if t.shape[-1] == vocab else t[..., :vocab] for t in logits]


def _check_logits(student: Tensor, teacher: Tensor, mask: Tensor | None, token_weights: Tensor | None) -> None:
    for name, t in (("student_logits", student), ("teacher_logits", teacher)):
        if not t.is_floating_point() or t.dim() == 0:
            raise InputError(f"{name} is {t.dtype} {tuple(t.shape)}; it must be (..., V) of a floating dtype")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise InputError(
            f"student_logits is {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)}; they must hold the "
            "same tokens: (..., V) and (..., U)"
        )
    for name, t, wanted in (("mask", mask, "bool"), ("token_weights", token_weights, "floating")):
        right = t is None or (t.dtype == torch.bool if wanted == "bool" else t.is_floating_point())
        if not right or (t is not None and t.shape != student.shape[:-1]):
            shape = tuple(student.shape[:-1])
            raise InputError(f"{name} is {tuple(t.shape)} {t.dtype}; it must be {wanted} and {shape}")
    check_devices(student, teacher, mask, token_weights)
