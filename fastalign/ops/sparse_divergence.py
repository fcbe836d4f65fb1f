"""Divergence from a teacher of which only the top k log-probabilities are known, straight from hidden states.

All that this needs of the student are k log-probabilities per row and the mass of all other entries, the *tail*. The op
here computes those and their gradients, and plain PyTorch on (N, k + 1) buckets does the rest. Each vocabulary tile is
folded once. The k entries are left out of the running sums, so that no tail comes from a subtraction from 1:

    m = maximum of the tail's z      tail = sum' exp(z - m)      E = sum' exp(z - m) slope W / tail

With G_i = d loss / d log s_i, g = d loss / d log s_tail and their sum S, the gradient in hidden is
`sum_i (G_i - s_i S) slope_i W_i + (g - s_tail S) E`: two products with a frozen output layer, forward and backward
together. A trainable one recomputes the logits, and takes two more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastalign import reference
from fastalign.errors import InputError
from fastalign.ops.backends import cpu_head, pick
from fastalign.ops.backends.launch import without_autocast
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head import divergence_tiles as tiles
from fastalign.ops.head import tiling
from fastalign.ops.head.checks import (
    check_devices,
    check_divergence,
    check_linear,
    check_per_token,
    check_tail,
    check_teacher_entries,
    check_token_ids,
)
from fastalign.ops.head.divergence_terms import without_distribution
from fastalign.ops.head.products import accumulate, operand
from fastalign.ops.head.rows import counting_mask, kept_rows
from fastalign.ops.head.tiling import START, pad_rows, row_slices, vocabulary_tiles
from fastalign.ops.head.transform import pack_transform, unpack_transform
from fastalign.reference import Divergence, Tail

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch", "cpu")
_GATHERED = 1 << 24  # bytes of gathered weight rows at a time

_library = torch.library.Library("fastalign", "FRAGMENT")
# Returns log-probabilities (N, k + 1), E (N, H) or an empty tensor, the k logits (N, k), and stats (N, 2): m and tail.
_library.define(
    "linear_topk_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor indices, Tensor? mask, float[] transform, "
    "bool grads, *, str backend='torch') -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_topk_logprobs_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor indices, "
    "Tensor? mask, Tensor logprobs, Tensor expected, Tensor picked, Tensor stats, float[] transform, bool[3] needs, "
    "*, str backend='torch') -> (Tensor, Tensor, Tensor)"
)


class _EntriesByTile:
    """Where the k entries of each row of a block (R, k) lie, tile by tile in the order of the vocabulary."""

    def __init__(self, indices: Tensor, edges: list[int]):
        self.k, self.flat = indices.shape[1], indices.reshape(-1)
        rising, self.order = self.flat.sort()
        self.bounds = torch.searchsorted(rising, torch.tensor(edges, device=indices.device)).tolist()

    def __getitem__(self, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        """(positions in the flat (R k) entries, rows, entries of the vocabulary) of one tile."""
        at = self.order[self.bounds[tile] : self.bounds[tile + 1]]
        return at, at // self.k, self.flat[at]


def _edges(vocab: int, device: torch.device) -> list[int]:
    """Where vocabulary tiles begin, and V."""
    return [start for start, _ in vocabulary_tiles(vocab, tiling.divergence_tile_shape(device)[1])] + [vocab]


def _blocks(rows: int, device: torch.device) -> list[slice]:
    return row_slices(rows, tiling.divergence_tile_shape(device)[0])


def _fold_vocabulary(side: tiles.Side, indices: Tensor, grads: bool, like: Tensor) -> tuple[Tensor, ...]:
    """Logits (R, k) of the entries, m (R,), tail (R,) and, with grads, E (R, H) of one block of rows."""
    (rows, k), edges = indices.shape, _edges(side.weight.shape[0], like.device)
    entries, picked = _EntriesByTile(indices, edges), like.new_empty(rows * k)
    m, tail = like.new_full((rows,), START), like.new_zeros(rows)
    expected = like.new_zeros(side.hidden.shape) if grads else like.new_zeros(0)
    room = like.new_empty(rows * min(tiling.divergence_tile_shape(like.device)[1], edges[-1]))
    for i, (v0, v1) in enumerate(pairwise(edges)):
        z = tiles.project(side, v0, v1, room[: rows * (v1 - v0)].view(rows, v1 - v0))  # (R, T)
        at, row, entry = entries[i]
        picked[at] = z[row, entry - v0]
        z[row, entry - v0] = 2 * START  # below every logit of the tail, so its exponential is 0
        top = torch.maximum(m, z.amax(1))
        shrink, m = (m - top).exp(), top
        slope = side.transform.slope(z) if grads and side.transform.softcap is not None else None
        tail = tail * shrink + z.sub_(m.unsqueeze(1)).exp_().sum(1)
        if grads:
            z = z if slope is None else z.mul_(slope)
            accumulate(expected.mul_(shrink.unsqueeze(1)), z, operand(side.weight[v0:v1]))
    if grads:
        factor = side.transform.factor if side.transform.softcap is None else 1.0
        # Where the teacher names every entry there is no tail, and its mean is 0 rather than 0 / 0.
        expected.mul_((factor / tail.masked_fill(tail == 0, torch.inf)).unsqueeze(1))
    return picked.view(rows, k), m, tail, expected


def topk_and_tail_logprobs(picked: Tensor, m: Tensor, tail: Tensor) -> Tensor:
    """Log-probabilities (R, k + 1) of the k entries and of the tail; -inf where there is no tail.

    picked (R, k): the entries' logits. m (R,) and tail (R,): the tail's maximum, and its `sum exp(z - m)`.
    """
    z = torch.cat([picked, m.unsqueeze(1)], 1)
    z = z - z.amax(1, keepdim=True)
    mass = z.exp()
    mass[:, -1] *= tail
    z[:, -1] += tail.log()
    return z - mass.sum(1, keepdim=True).log()


def check_entries(indices: Tensor, vocab: int) -> None:
    """Checks that entries (N, k) lie in the vocabulary and, on the CPU, that those of a row differ.

    On a GPU the second check would make the host wait.

    Raises:
        InputError: They do not.
    """
    check_token_ids("teacher_indices", indices, vocab, op="sparse_divergence")
    if indices.device.type == "cpu" and bool((indices.sort(-1).values.diff(dim=-1) == 0).any()):
        raise InputError("teacher_indices holds an entry twice in one row; give distinct token ids")


def _linear_topk_logprobs(hidden, weight, bias, indices, mask, transform, grads, *, backend="torch"):
    n, rows = hidden.shape[0], kept_rows(mask)
    check_entries(indices if rows is None else indices[rows], weight.shape[0])
    if backend == "cpu":
        targets, order = indices.sort(-1)
        rising, expected, stats = cpu_head.linear_topk_logprobs(
            hidden, weight, targets, rows, bias, transform, grads=grads
        )
        picked = torch.empty_like(rising).scatter_(1, order, rising)
        logprobs = topk_and_tail_logprobs(picked, *stats.unbind(1))
        return logprobs if rows is None else logprobs.masked_fill_(~mask.unsqueeze(1), 0.0), expected, picked, stats
    kept_hidden, kept_indices = (pad_rows(t if rows is None else t[rows]) for t in (hidden, indices))
    like = hidden.new_empty(0, dtype=reference.compute_dtype(hidden))
    side = tiles.Side(kept_hidden, weight, bias, unpack_transform(transform))
    # No rows make one empty block, which gives results of the right widths.
    blocks = _blocks(len(kept_hidden), like.device) or [slice(0, 0)]
    parts = [_fold_vocabulary(side.block(b), kept_indices[b], grads, like) for b in blocks]
    picked, m, tail, expected = (torch.cat(part) for part in zip(*parts, strict=True))
    nothing = without_distribution(torch.maximum(picked.amax(1), m), side.transform)
    logprobs = topk_and_tail_logprobs(picked, m, tail).masked_fill_(nothing.unsqueeze(1), math.nan)
    found = (logprobs, expected, picked, torch.stack([m, tail], 1))
    count = n if rows is None else rows.numel()
    if rows is None:  # without the padding; a copy, because an op must not return a view
        return tuple(t[:count].clone() if t.shape[0] != count and t.dim() == 2 else t for t in found)
    return tuple(
        t.new_zeros(n, t.shape[1]).index_copy_(0, rows, t[:count]) if t.dim() == 2 else t for t in found
    )  # fmt: skip


def _linear_topk_logprobs_fake(hidden, weight, bias, indices, mask, transform, grads, *, backend="torch"):
    n, k = indices.shape
    new = hidden.new_empty(0, dtype=reference.compute_dtype(hidden))
    return (
        new.new_empty(n, k + 1),
        new.new_empty(hidden.shape if grads else 0),
        new.new_empty(n, k),
        new.new_empty(n, 2),
    )


def _linear_topk_logprobs_backward(
    grad, hidden, weight, bias, indices, mask, logprobs, expected, picked, stats, transform, needs, *, backend="torch"
):  # fmt: skip
    n, rows = hidden.shape[0], kept_rows(mask)
    given = (grad, logprobs, picked, stats, indices, hidden)
    grad, logprobs, picked, stats, kept_indices, kept_hidden = (t if rows is None else t[rows] for t in given)
    head = unpack_transform(transform)
    # d loss / d z of the k entries, and of the tail as a whole: (S, k + 1).
    coefficients = grad - logprobs.exp() * grad.sum(1, keepdim=True)
    slope = head.slope(picked) if head.softcap is not None else head.factor
    d_picked = coefficients[:, :-1] * slope  # (S, k) in the products
    empty = hidden.new_empty(0)
    d_hidden = empty
    if needs[0]:
        kept_expected = expected if rows is None else expected[rows]
        found = _weighted_rows(d_picked, weight, kept_indices).addcmul_(kept_expected, coefficients[:, -1:])
        d_hidden = found if rows is None else found.new_zeros(n, found.shape[1]).index_copy_(0, rows, found)
    d_weight, d_bias = empty.clone(), empty.clone()
    if backend == "cpu" and any(needs[1:]):
        targets, order = kept_indices.sort(-1)
        grads = cpu_head.linear_topk_logprobs_backward(
            d_picked.gather(1, order), coefficients[:, -1], kept_hidden, weight, targets, bias, stats, transform,
            needs[1:],
        )  # fmt: skip
        d_weight, d_bias = (empty.clone() if d is None else d for d in grads)
    elif needs[1] or needs[2]:
        stats = pad_rows(stats)
        stats[len(d_picked) :, 0] = -START  # padding's exponentials are 0
        side = tiles.Side(pad_rows(kept_hidden), weight, bias, head)
        d_weight, d_bias = _head_gradients(
            side, pad_rows(kept_indices), pad_rows(d_picked), pad_rows(coefficients[:, -1]), stats, needs[1:]
        )
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _weighted_rows(d_picked: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """`sum_i d_picked_i W[index_i]` (S, H), some rows at a time, so that few weight rows are copied at a time."""
    step = max(1, _GATHERED // (indices.shape[1] * weight.shape[1] * d_picked.element_size()))
    parts = [
        torch.bmm(c.unsqueeze(1), weight[i].to(d_picked.dtype)).squeeze(1)
        for c, i in zip(d_picked.split(step), indices.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else d_picked.new_zeros(0, weight.shape[1])


def _head_gradients(
    side: tiles.Side,
    indices: Tensor,  # (S, k)
    d_picked: Tensor,  # (S, k)
    tail_coefficients: Tensor,  # (S,)
    stats: Tensor,  # (S, 2)
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients in weight and bias, from fresh logits; padding has coefficients of 0."""
    edges = _edges(side.weight.shape[0], stats.device)
    blocks = [(b, side.block(b), _EntriesByTile(indices[b], edges)) for b in _blocks(len(indices), stats.device)]
    has_bias = side.bias is not None and needs[1]
    d_weight = torch.empty_like(side.weight) if needs[0] else stats.new_empty(0).to(side.weight.dtype, copy=True)
    d_bias = torch.empty_like(side.bias) if side.bias is not None and has_bias else stats.new_empty(0)
    scale = tail_coefficients / stats[:, 1].masked_fill(stats[:, 1] == 0, 1.0)
    for i, (v0, v1) in enumerate(pairwise(edges)):
        dw, db = stats.new_zeros(v1 - v0, side.weight.shape[1]), stats.new_zeros(v1 - v0)
        for block, part, entries in blocks:
            z = tiles.project(part, v0, v1, stats.new_empty(part.hidden.shape[0], v1 - v0))
            slope = side.transform.slope(z) if side.transform.softcap is not None else side.transform.factor
            c = z.sub_(stats[block, 0:1]).exp_().mul_(scale[block].unsqueeze(1)).mul_(slope)
            at, row, entry = entries[i]
            c[row, entry - v0] = d_picked[block].reshape(-1)[at]
            tiles.add_head_gradients(
                c, part.hidden, dw if needs[0] else None, db if has_bias else None, slice(None)
            )  # fmt: skip
        if needs[0]:
            d_weight[v0:v1] = dw
        if has_bias:
            d_bias[v0:v1] = db
    return d_weight, d_bias


def _linear_topk_logprobs_backward_fake(
    grad, hidden, weight, bias, indices, mask, logprobs, expected, picked, stats, transform, needs, *, backend="torch"
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        bias.new_empty(bias.shape) if needs[2] else hidden.new_empty(0),
    )


_library.impl("linear_topk_logprobs", without_autocast(_linear_topk_logprobs), "CompositeExplicitAutograd")
_library.impl(
    "linear_topk_logprobs_backward", without_autocast(_linear_topk_logprobs_backward), "CompositeExplicitAutograd"
)
torch.library.register_fake("fastalign::linear_topk_logprobs", _linear_topk_logprobs_fake, lib=_library)
torch.library.register_fake(
    "fastalign::linear_topk_logprobs_backward", _linear_topk_logprobs_backward_fake, lib=_library
)


@register_flop_formula(torch.ops.fastalign.linear_topk_logprobs)
def _forward_flop(h, w, bias, indices, mask, transform, grads, *args, **kwargs) -> int:
    return (1 + grads) * 2 * h[0] * w[0] * w[1]


@register_flop_formula(torch.ops.fastalign.linear_topk_logprobs_backward)
def _backward_flop(grad, h, w, *args, **kwargs) -> int:
    needs = args[-1]
    return ((needs[1] or needs[2]) + needs[1]) * 2 * h[0] * w[0] * w[1]


class _TopkLogprobs(torch.autograd.Function):
    """The student's log-probabilities (N, k + 1): of the k entries, and of the tail."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, indices, mask, transform, needs, backend):
        logprobs, *rest = torch.ops.fastalign.linear_topk_logprobs(
            hidden, weight, bias, indices, mask, transform, needs[0], backend=backend
        )
        ctx.transform, ctx.needs, ctx.backend = transform, needs, backend
        ctx.save_for_backward(hidden, weight, bias, indices, mask, logprobs, *rest)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        found = torch.ops.fastalign.linear_topk_logprobs_backward(
            grad.contiguous(), *ctx.saved_tensors, ctx.transform, ctx.needs, backend=ctx.backend
        )
        return *(g if need else None for g, need in zip(found, ctx.needs, strict=True)), *[None] * 5


def divergence_of_buckets(
    logprobs: Tensor,  # (N, k + 1) of the student, the tail last
    teacher: Tensor,  # (N, k)
    divergence: Divergence,
    jsd_beta: float,
    *,
    with_tail: bool,
    mask: Tensor | None,  # (N,) bool
    token_weights: Tensor | None,  # (N,)
) -> Tensor:
    """The divergence per token (N,) over the k entries and, with the tail, all others as one bucket."""
    s = logprobs.double() if with_tail else logprobs[:, :-1].double()
    t = reference.with_tail(teacher.double()) if with_tail else teacher.double()
    if mask is not None:
        s, t = (b.masked_fill(~mask.unsqueeze(1), 0.0) for b in (s, t))
    values = reference.divergence_of_logprobs(s, t, divergence, jsd_beta).to(logprobs.dtype)
    return values if token_weights is None else values * token_weights.detach().to(values.dtype)


def sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tail: Tail = "lump",
    backend: Backend = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution from a teacher's top k, per token, from hidden states.

    With tail="lump" it is the `divergence` of `linear_divergence` over k + 1 buckets: the teacher's k entries, and all
    others as one, which has the teacher's mass `1 - sum exp(teacher_logprobs)` (at least 1e-7, because the sum is
    rounded). It is at most the divergence over the whole vocabulary. With tail="drop" it is the sum of the k terms
    alone, unnormalised: that is no divergence, and can be negative. The result, in nats, is differentiable (once) in
    hidden, weight and bias; the teacher is a constant.

    Cost, forward and backward, with U = 2 N V H FLOP: 2U with a frozen output layer, 4U with a trainable one. Extra
    memory is O(rows x (H + k)) plus a tile.

    Args:
        hidden: (..., H) floating.
        weight: (V, H) floating.
        teacher_indices: (..., k) int64 in [0, V), distinct in each row.
        teacher_logprobs: (..., k) floating, at the same temperature; -inf where a row has fewer entries.
        bias: (V,) floating.
        mask: (...) bool. Rows where it is False are dropped before any product, return 0 and get zero gradient.
        token_weights: (...) floating constants that multiply the divergences. Rows of weight 0 are dropped too.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        temperature: Divides the logits; above 0.
        jsd_beta: The teacher's share in the jsd's mixture, between 0 and 1.
        logit_scale: Multiplies the products.
        softcap: Bounds the logits before the temperature, or None.
        tail: "lump" or "drop".
        backend: "torch" (tiled), "cpu" (C++), "reference" (materialises the logits), or "auto": on the CPU "cpu" where
            it is faster, else "torch".

    Returns:
        (...) float32, or float64 for float64 inputs.

    Raises:
        InputError: A shape, dtype, device, index or option does not fit.
        BackendError: There is no such backend, or the backend that was named cannot run.
    """
    check_divergence(divergence, temperature, jsd_beta)
    check_tail(tail)
    check_linear(hidden, weight, bias, softcap, logit_scale)
    shape, vocab = hidden.shape[:-1], weight.shape[0]
    check_teacher_entries(shape, vocab, teacher_indices, teacher_logprobs)
    k = teacher_indices.shape[-1]
    check_per_token(mask, token_weights, shape)
    check_devices(hidden, weight, bias, teacher_indices, teacher_logprobs, mask, token_weights)
    common = torch.promote_types(hidden.dtype, weight.dtype)
    student = hidden.to(common), weight.to(common)
    backend = pick.resolve("sparse_divergence", backend, *student, bias, backends=BACKENDS, cpu_kernel="picked")
    if backend == "reference":
        values = reference.sparse_divergence(
            hidden, weight, teacher_indices, teacher_logprobs, bias=bias, mask=mask, divergence=divergence,
            temperature=temperature, jsd_beta=jsd_beta, logit_scale=logit_scale, softcap=softcap, tail=tail,
        )  # fmt: skip
        return values if token_weights is None else values * token_weights.to(values.dtype)
    counts = counting_mask(mask, token_weights)
    counts = None if counts is None else counts.reshape(-1)
    needs_grad = torch.is_grad_enabled()
    needs = tuple(needs_grad and t is not None and t.requires_grad for t in (hidden, weight, bias))
    logprobs = _TopkLogprobs.apply(
        student[0].reshape(-1, hidden.shape[-1]), student[1], bias, teacher_indices.reshape(-1, k), counts,
        pack_transform(logit_scale, softcap, temperature), needs, backend,
    )  # fmt: skip
    values = divergence_of_buckets(
        logprobs, teacher_logprobs.detach().reshape(-1, k), divergence, jsd_beta,
        with_tail=tail == "lump" and k < vocab, mask=counts,
        token_weights=None if token_weights is None else token_weights.reshape(-1),
    )  # fmt: skip
    return values.view(shape)
