"""Divergence from a teacher's top k, from student logits that already exist, some rows at a time.

The k log-probabilities and the tail's, as `sparse_divergence.py` has them, from whole rows of logits; backward forms
the gradient from the logits again. Schema, fake, autograd and the public function.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.head import divergence_tiles as tiles
from fastalign.ops.head.checks import check_devices, check_divergence_options
from fastalign.ops.sparse_divergence import (
    BACKENDS,
    _check_indices,
    _check_teacher,
    _normalise,
    divergence_of_buckets,
    rows_that_count,
)

# Rows taken at a time fill this many logits, so that no second [tokens, V] float32 tensor exists in forward.
_CHUNK = 1 << 21

_library = torch.library.Library("fastalign", "FRAGMENT")
_library.define("topk_logprobs(Tensor logits, Tensor indices, Tensor? mask, float temperature) -> (Tensor, Tensor)")
_library.define(
    "topk_logprobs_backward(Tensor grad, Tensor logits, Tensor indices, Tensor? mask, Tensor logprobs, Tensor stats, "
    "float temperature) -> Tensor"
)


def _chunks(logits: Tensor, mask: Tensor | None, temperature: float):
    """(rows, their logits over temperature in float32 or float64), some unmasked rows at a time."""
    kept = torch.arange(len(logits), device=logits.device) if mask is None else mask.nonzero().squeeze(1)
    for rows in kept.split(max(1, _CHUNK // max(logits.shape[1], 1))):
        yield rows, logits[rows].to(reference.compute_dtype(logits)).clamp_(min=tiles.START).div_(temperature)


def _topk_logprobs(logits, indices, mask, temperature):
    _check_indices(indices if mask is None else indices[mask], logits.shape[1])
    (n, k), dtype = indices.shape, reference.compute_dtype(logits)
    logprobs, stats = logits.new_zeros(n, k + 1, dtype=dtype), logits.new_zeros(n, 2, dtype=dtype)
    for rows, z in _chunks(logits, mask, temperature):
        picked = z.gather(1, indices[rows])
        top = z.scatter_(1, indices[rows], tiles.START).amax(1)
        tail = z.sub_(top.unsqueeze(1)).exp_().sum(1)
        logprobs[rows], stats[rows] = _normalise(picked, top, tail), torch.stack([top, tail], 1)
    return logprobs, stats


def _topk_logprobs_backward(grad, logits, indices, mask, logprobs, stats, temperature):
    out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for rows, z in _chunks(logits, mask, temperature):
        g, (top, tail) = grad[rows], stats[rows].split(1, 1)
        c = (g - logprobs[rows].exp() * g.sum(1, keepdim=True)) / temperature  # (R, k + 1), the tail's in all
        d = z.sub_(top).exp_().mul_(c[:, -1:] / tail)
        out[rows] = d.scatter_(1, indices[rows], c[:, :-1]).to(out.dtype)
    return out


_library.impl("topk_logprobs", _topk_logprobs, "CompositeExplicitAutograd")
_library.impl("topk_logprobs_backward", _topk_logprobs_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastalign::topk_logprobs", lib=_library)
def _fake(logits, indices, mask, temperature):
    n, k = indices.shape
    new = logits.new_empty(0, dtype=reference.compute_dtype(logits))
    return new.new_empty(n, k + 1), new.new_empty(n, 2)


@torch.library.register_fake("fastalign::topk_logprobs_backward", lib=_library)
def _backward_fake(grad, logits, indices, mask, logprobs, stats, temperature):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class _TopkLogprobs(torch.autograd.Function):
    """(N, k + 1) log-probabilities of the student: the k entries, and the tail."""

    @staticmethod
    def forward(ctx, logits, indices, mask, temperature):
        logprobs, stats = torch.ops.fastalign.topk_logprobs(logits, indices, mask, temperature)
        ctx.save_for_backward(logits, indices, mask, logprobs, stats)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return torch.ops.fastalign.topk_logprobs_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None, None


def sparse_logits_divergence(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    tail: str = "lump",
    backend: str = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution from a teacher's top k, per token, from the student's logits.

    As `sparse_divergence`, for who has logits already: over the teacher's k entries and, with tail="lump", all others
    as one. Differentiable (once) in the logits, of which forward makes no second copy.

    student_logits: (..., V) floating. teacher_indices: (..., k) int64 in [0, V), distinct in a row. teacher_logprobs:
        (..., k) floating, at the same temperature; -inf where a row has fewer entries.
    mask: (...) bool. Rows where it is False are not looked at, return 0 and get zero gradient.
    token_weights: (...) constants that multiply the divergences; rows of weight 0 are not looked at either.
    backend: "torch" (some rows at a time), "reference", or "auto".

    Returns (...) float32, or float64 for float64 logits. InputError names a wrong shape, dtype, device, index or
    option; BackendError an unknown backend.
    """
    check_divergence_options(divergence, temperature, jsd_beta, None, "auto")
    if not student_logits.is_floating_point() or student_logits.dim() == 0:
        found = f"{student_logits.dtype} {tuple(student_logits.shape)}"
        raise InputError(f"student_logits is {found}; it must be (..., V) of a floating dtype")
    shape, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    _check_teacher(shape, vocab, teacher_indices, teacher_logprobs, mask, token_weights)
    check_devices(student_logits, teacher_indices, teacher_logprobs, mask, token_weights)
    if tail not in ("lump", "drop"):
        raise InputError(f"tail is {tail!r}; it must be lump or drop")
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; sparse_logits_divergence has {', '.join(BACKENDS)}")
    kept, k = rows_that_count(mask, token_weights), teacher_indices.shape[-1]
    if backend == "reference":
        values = reference.sparse_logits_divergence(
            student_logits, teacher_indices, teacher_logprobs, divergence=divergence, temperature=temperature,
            jsd_beta=jsd_beta, tail=tail,
        )  # fmt: skip
        values = values if kept is None else values.masked_fill(~kept.view(shape), 0.0)
        return values if token_weights is None else values * token_weights.detach().to(values.dtype)
    logprobs = _TopkLogprobs.apply(
        student_logits.reshape(-1, vocab), teacher_indices.reshape(-1, k), kept, float(temperature)
    )
    values = divergence_of_buckets(
        logprobs, teacher_logprobs.detach().reshape(-1, k), divergence, jsd_beta,
        with_tail=tail == "lump" and k < vocab, mask=kept,
        token_weights=None if token_weights is None else token_weights.reshape(-1),
    )  # fmt: skip
    return values.view(shape)
