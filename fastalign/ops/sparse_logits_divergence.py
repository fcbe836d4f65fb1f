"""Divergence from a teacher's top k, from student logits that already exist, some rows at a time.

The log-probabilities of the k entries and of the tail are those of `sparse_divergence.py`, from whole rows of logits.
Backward reads the logits a second time to form the gradient. Top to bottom: schema, kernels, fakes, autograd, and the
public function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.ops.backends import pick
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head.checks import (
    check_devices,
    check_divergence,
    check_floating,
    check_per_token,
    check_tail,
    check_teacher_entries,
    check_vocabulary,
)
from fastalign.ops.head.rows import counting_mask
from fastalign.ops.head.tiling import START, unmasked_rows
from fastalign.ops.logits_divergence import without_entries
from fastalign.ops.sparse_divergence import check_entries, divergence_of_buckets, topk_and_tail_logprobs
from fastalign.reference import Divergence, Tail

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch")

_library = torch.library.Library("fastalign", "FRAGMENT")
_library.define("topk_logprobs(Tensor logits, Tensor indices, Tensor? mask, float temperature) -> (Tensor, Tensor)")
_library.define(
    "topk_logprobs_backward(Tensor grad, Tensor logits, Tensor indices, Tensor? mask, Tensor logprobs, Tensor stats, "
    "float temperature) -> Tensor"
)


def _scaled_logits(logits: Tensor, mask: Tensor | None, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Some unmasked rows at a time: their numbers, and their logits over temperature in float32 or float64."""
    for rows in unmasked_rows(logits, mask):
        yield rows, logits[rows].to(reference.compute_dtype(logits)).div_(temperature).clamp_(min=START)


def _topk_logprobs(logits, indices, mask, temperature):
    check_entries(indices if mask is None else indices[mask], logits.shape[1])
    (n, k), dtype = indices.shape, reference.compute_dtype(logits)
    logprobs, stats = logits.new_zeros(n, k + 1, dtype=dtype), logits.new_zeros(n, 2, dtype=dtype)
    for rows, z in _scaled_logits(logits, mask, temperature):
        picked = z.gather(1, indices[rows])
        # The k entries are not in the tail: they go below all others, which are at least START.
        top = z.scatter_(1, indices[rows], 2 * START).amax(1)
        tail = z.sub_(top.unsqueeze(1)).exp_().sum(1)
        nothing = without_entries(torch.maximum(picked.amax(1), top), logits, rows)
        found = topk_and_tail_logprobs(picked, top, tail)
        logprobs[rows] = found.masked_fill_(nothing.unsqueeze(1), math.nan)
        stats[rows] = torch.stack([top, tail], 1)
    return logprobs, stats


def _topk_logprobs_backward(grad, logits, indices, mask, logprobs, stats, temperature):
    out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for rows, z in _scaled_logits(logits, mask, temperature):
        g, (top, tail) = grad[rows], stats[rows].split(1, 1)
        c = (g - logprobs[rows].exp() * g.sum(1, keepdim=True)) / temperature  # (R, k + 1) d loss / d z
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


class _TopkLogprobsOfLogits(torch.autograd.Function):
    """The student's log-probabilities (N, k + 1): of the k entries, and of the tail."""

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
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    tail: Tail = "lump",
    backend: Backend = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution from a teacher's top k, per token, from the student's logits.

    It is `sparse_divergence` for callers that have logits already: over the teacher's k entries and, with tail="lump",
    all others as one bucket, in nats. It is differentiable (once) in the logits, of which forward makes no second copy.

    Args:
        student_logits: (..., V) floating.
        teacher_indices: (..., k) int64 in [0, V), distinct in each row.
        teacher_logprobs: (..., k) floating, at the same temperature; -inf where a row has fewer entries.
        mask: (...) bool. Rows where it is False are not read, return 0 and get zero gradient.
        token_weights: (...) floating constants that multiply the divergences. Rows of weight 0 are not read either.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        temperature: Divides the logits; above 0.
        jsd_beta: The teacher's share in the jsd's mixture, between 0 and 1.
        tail: "lump" or "drop".
        backend: "torch" (some rows at a time), "reference", or "auto".

    Returns:
        (...) float32, or float64 for float64 logits.

    Raises:
        InputError: A shape, dtype, device, index or option does not fit.
        BackendError: The backend is unknown.
    """
    check_divergence(divergence, temperature, jsd_beta)
    check_tail(tail)
    check_floating("student_logits", student_logits, "call student_logits.float()")
    vocab = student_logits.shape[-1] if student_logits.dim() else 0
    check_vocabulary("student_logits", student_logits.shape, vocab)
    shape = student_logits.shape[:-1]
    check_teacher_entries(shape, vocab, teacher_indices, teacher_logprobs)
    check_per_token(mask, token_weights, shape)
    check_devices(student_logits, teacher_indices, teacher_logprobs, mask, token_weights)
    backend = pick.resolve("sparse_logits_divergence", backend, student_logits, backends=BACKENDS)
    counts, k = counting_mask(mask, token_weights), teacher_indices.shape[-1]
    if backend == "reference":
        values = reference.sparse_logits_divergence(
            student_logits, teacher_indices, teacher_logprobs, divergence=divergence, temperature=temperature,
            jsd_beta=jsd_beta, tail=tail,
        )  # fmt: skip
        values = values if counts is None else values.masked_fill(~counts, 0.0)
        return values if token_weights is None else values * token_weights.detach().to(values.dtype)
    counts = None if counts is None else counts.reshape(-1)
    logprobs = _TopkLogprobsOfLogits.apply(
        student_logits.reshape(-1, vocab), teacher_indices.reshape(-1, k), counts, float(temperature)
    )
    values = divergence_of_buckets(
        logprobs, teacher_logprobs.detach().reshape(-1, k), divergence, jsd_beta,
        with_tail=tail == "lump" and k < vocab, mask=counts,
        token_weights=None if token_weights is None else token_weights.reshape(-1),
    )  # fmt: skip
    return values.view(shape)
