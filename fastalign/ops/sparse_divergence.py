"""Divergence from a teacher of which only the top k log-probabilities are known, straight from hidden states.

All that this needs of the student are k log-probabilities per row and the mass of all other entries, the tail. The op
here gives those and their gradients, and plain PyTorch on (N, k + 1) buckets does the rest. Each vocabulary tile is
folded once, with the k entries left out of the running sums, so that no tail comes from a subtraction from 1:

    m = maximum of the tail's z      tail = sum' exp(z - m)      E = sum' exp(z - m) slope W / tail

With G_i = d loss / d log s_i, g = d loss / d log s_tail and their sum S, the gradient in hidden is
`sum_i (G_i - s_i S) slope_i W_i + (g - s_tail S) E`: two products with a frozen head, forward and backward together.
A trainable head forms the logits again, and takes two more.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.backends import cpu
from fastalign.ops.backends.pick import without_autocast
from fastalign.ops.head import divergence_tiles as tiles
from fastalign.ops.head.checks import check_devices, check_divergence_options, check_side
from fastalign.ops.head.options import head_numbers
from fastalign.ops.head.products import accumulate, operand
from fastalign.ops.head.rows import kept_rows, pad_rows

BACKENDS = ("auto", "reference", "torch", "cpu")
_GATHERED = 1 << 24  # bytes of gathered weight rows at a time

_library = torch.library.Library("fastalign", "FRAGMENT")
_library.define(
    "linear_topk_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor indices, Tensor? mask, float[] head, "
    "bool grads, *, str backend='torch') -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_topk_logprobs_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor indices, "
    "Tensor? mask, Tensor logprobs, Tensor expected, Tensor picked, Tensor stats, float[] head, bool[3] needs, *, "
    "str backend='torch') -> (Tensor, Tensor, Tensor)"
)


class _Picks:
    """Where the k entries of each row of a block (R, k) lie, in the order of the vocabulary, tile by tile."""

    def __init__(self, indices: Tensor, edges: list[int]):
        self.k, self.flat = indices.shape[1], indices.reshape(-1)
        rising, self.order = self.flat.sort()
        self.bounds = torch.searchsorted(rising, torch.tensor(edges, device=indices.device)).tolist()

    def __getitem__(self, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        """(positions in the flat (R k) entries, rows, entries of the vocabulary) of one tile."""
        at = self.order[self.bounds[tile] : self.bounds[tile + 1]]
        return at, at // self.k, self.flat[at]


def _edges(vocab: int, device: torch.device) -> list[int]:
    return [start for start, _ in tiles.vocabulary_tiles(vocab, device)] + [vocab]


def _blocks(n: int, device: torch.device) -> list[slice]:
    step = tiles.tile_shape(device)[0]
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _scan(side: tiles.Side, indices: Tensor, grads: bool, like: Tensor) -> tuple[Tensor, ...]:
    """Picked (R, k) logits, m (R,), tail (R,) and, with grads, E (R, H) of one block of rows."""
    (rows, k), edges = indices.shape, _edges(side.weight.shape[0], like.device)
    picks, picked = _Picks(indices, edges), like.new_empty(rows * k)
    m, tail = like.new_full((rows,), tiles.START), like.new_zeros(rows)
    expected = like.new_zeros(side.hidden.shape) if grads else like.new_zeros(0)
    room = like.new_empty(rows * min(tiles.tile_shape(like.device)[1], edges[-1]))
    for i, (v0, v1) in enumerate(pairwise(edges)):
        z = tiles.project(side, v0, v1, room[: rows * (v1 - v0)].view(rows, v1 - v0))
        at, row, entry = picks[i]
        picked[at] = z[row, entry - v0]
        z[row, entry - v0] = 2 * tiles.START  # further below than anything that counts
        top = torch.maximum(m, z.amax(1))
        shrink, m = (m - top).exp(), top
        slope = tiles.slope_of(z, side.head) if grads and side.head.softcap is not None else None
        tail = tail * shrink + z.sub_(m.unsqueeze(1)).exp_().sum(1)
        if grads:
            z = z if slope is None else z.mul_(slope)
            accumulate(expected.mul_(shrink.unsqueeze(1)), z, operand(side.weight[v0:v1]))
    if grads:
        factor = side.head.factor if side.head.softcap is None else 1.0
        expected.mul_((factor / tail.clamp(min=torch.finfo(tail.dtype).tiny)).unsqueeze(1))
    return picked.view(rows, k), m, tail, expected


def _normalise(picked: Tensor, m: Tensor, tail: Tensor) -> Tensor:
    """Log-probabilities (R, k + 1) of the k entries and of the tail; -inf where there is no tail."""
    z = torch.cat([picked, m.unsqueeze(1)], 1)
    z = z - z.amax(1, keepdim=True)
    mass = z.exp()
    mass[:, -1] *= tail
    z[:, -1] += tail.log()
    return z - mass.sum(1, keepdim=True).log()


def _check_indices(indices: Tensor, vocab: int) -> None:
    """That they are in the vocabulary, and (where looking costs no wait) distinct in a row."""
    if indices.device.type != "cpu":
        inside = (indices >= 0) & (indices < vocab)
        return torch._assert_async(inside.all(), "sparse_divergence: a teacher index is outside the vocabulary")
    bad = indices[(indices < 0) | (indices >= vocab)]
    if bad.numel():
        raise InputError(
            f"teacher_indices holds {bad[0].item()}, but the vocabulary has {vocab} entries; give token ids in "
            f"[0, {vocab})"
        )
    if bool((indices.sort(-1).values.diff(dim=-1) == 0).any()):
        raise InputError("teacher_indices holds an entry twice in one row; give distinct token ids")
    return None


def _linear_topk_logprobs(hidden, weight, bias, indices, mask, head, grads, *, backend="torch"):
    n, rows = hidden.shape[0], kept_rows(mask)
    _check_indices(indices if rows is None else indices[rows], weight.shape[0])
    if backend == "cpu":
        targets, order = indices.sort(-1)
        rising, expected, stats = cpu.linear_topk_logprobs(hidden, weight, targets, rows, bias, head, grads)
        picked = torch.empty_like(rising).scatter_(1, order, rising)
        logprobs = _normalise(picked, *stats.unbind(1))
        return logprobs if rows is None else logprobs.masked_fill_(~mask.unsqueeze(1), 0.0), expected, picked, stats
    kept_hidden, kept_indices = (pad_rows(t if rows is None else t[rows]) for t in (hidden, indices))
    like = hidden.new_empty(0, dtype=reference.compute_dtype(hidden))
    side = tiles.Side(kept_hidden, weight, bias, tiles.Head(head[0], head[1] or None, head[2]))
    parts = [_scan(side.block(b), kept_indices[b], grads, like) for b in _blocks(len(kept_hidden), like.device)]
    if not parts:
        parts = [_scan(side, kept_indices, grads, like)]
    picked, m, tail, expected = (torch.cat(part) for part in zip(*parts, strict=True))
    found = (_normalise(picked, m, tail), expected, picked, torch.stack([m, tail], 1))
    count = n if rows is None else rows.numel()
    if rows is None:
        return tuple(t[:count].clone() if t.shape[0] != count and t.dim() == 2 else t for t in found)
    return tuple(
        t.new_zeros(n, t.shape[1]).index_copy_(0, rows, t[:count]) if t.dim() == 2 else t for t in found
    )  # fmt: skip


def _linear_topk_logprobs_fake(hidden, weight, bias, indices, mask, head, grads, *, backend="torch"):
    n, k = indices.shape
    new = hidden.new_empty(0, dtype=reference.compute_dtype(hidden))
    return (
        new.new_empty(n, k + 1),
        new.new_empty(hidden.shape if grads else 0),
        new.new_empty(n, k),
        new.new_empty(n, 2),
    )


def _linear_topk_logprobs_backward(
    grad, hidden, weight, bias, indices, mask, logprobs, expected, picked, stats, options, needs, *, backend="torch"
):  # fmt: skip
    n, rows = hidden.shape[0], kept_rows(mask)
    head = tiles.Head(options[0], options[1] or None, options[2])
    kept = (grad, logprobs, picked, stats, indices, hidden)
    grad, logprobs, picked, stats, kept_indices, kept_hidden = (t if rows is None else t[rows] for t in kept)
    coefficients = grad - logprobs.exp() * grad.sum(1, keepdim=True)  # (S, k + 1) d loss / d z, the tail's in all
    slope = tiles.slope_of(picked, head) if head.softcap is not None else head.factor
    own = coefficients[:, :-1] * slope
    empty = hidden.new_empty(0)
    d_hidden = empty
    if needs[0]:
        kept_expected = expected if rows is None else expected[rows]
        found = _weighted_rows(own, weight, kept_indices).addcmul_(kept_expected, coefficients[:, -1:])
        d_hidden = found if rows is None else found.new_zeros(n, found.shape[1]).index_copy_(0, rows, found)
    d_weight, d_bias = empty.clone(), empty.clone()
    if backend == "cpu" and any(needs[1:]):
        targets, order = kept_indices.sort(-1)
        grads = own.gather(1, order), coefficients[:, -1]
        found = cpu.linear_topk_logprobs_backward(
            *grads, kept_hidden, weight, targets, None, bias, stats, options, needs[1:]
        )
        d_weight, d_bias = (empty.clone() if d is None else d for d in found)
    elif needs[1] or needs[2]:
        stats = pad_rows(stats)
        stats[len(own) :, 0] = -tiles.START  # padding's exponentials are 0
        side = tiles.Side(pad_rows(kept_hidden), weight, bias, head)
        d_weight, d_bias = _head_gradients(
            side, pad_rows(kept_indices), pad_rows(own), pad_rows(coefficients[:, -1]), stats, needs[1:]
        )
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _weighted_rows(own: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """`sum_i own_i W[index_i]` (S, H), some rows at a time."""
    step = max(1, _GATHERED // (indices.shape[1] * weight.shape[1] * own.element_size()))
    parts = [
        torch.bmm(c.unsqueeze(1), weight[i].to(own.dtype)).squeeze(1)
        for c, i in zip(own.split(step), indices.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else own.new_zeros(0, weight.shape[1])


def _head_gradients(side: tiles.Side, indices, own, tail_coefficients, stats, needs) -> tuple[Tensor, Tensor]:
    """Gradients in weight and bias, from fresh logits; padding has coefficients 0."""
    edges = _edges(side.weight.shape[0], stats.device)
    blocks = [(b, side.block(b), _Picks(indices[b], edges)) for b in _blocks(len(indices), stats.device)]
    d_weight = torch.empty_like(side.weight) if needs[0] else stats.new_empty(0).to(side.weight.dtype, copy=True)
    d_bias = torch.empty_like(side.bias) if needs[1] else stats.new_empty(0)
    scale = tail_coefficients / stats[:, 1].masked_fill(stats[:, 1] == 0, 1.0)
    for i, (v0, v1) in enumerate(pairwise(edges)):
        dw, db = stats.new_zeros(v1 - v0, side.weight.shape[1]), stats.new_zeros(v1 - v0)
        for block, part, picks in blocks:
            z = tiles.project(part, v0, v1, stats.new_empty(part.hidden.shape[0], v1 - v0))
            slope = tiles.slope_of(z, side.head) if side.head.softcap is not None else side.head.factor
            c = z.sub_(stats[block, 0:1]).exp_().mul_(scale[block].unsqueeze(1)).mul_(slope)
            at, row, entry = picks[i]
            c[row, entry - v0] = own[block].reshape(-1)[at]
            tiles.spread(c, part.hidden, dw if needs[0] else None, db if needs[1] else None, slice(None))
        if needs[0]:
            d_weight[v0:v1] = dw
        if needs[1]:
            d_bias[v0:v1] = db
    return d_weight, d_bias


def _linear_topk_logprobs_backward_fake(
    grad, hidden, weight, bias, indices, mask, logprobs, expected, picked, stats, options, needs, *, backend="torch"
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
def _forward_flop(h, w, bias, indices, mask, head, grads, *args, **kwargs) -> int:
    return (1 + grads) * 2 * h[0] * w[0] * w[1]


@register_flop_formula(torch.ops.fastalign.linear_topk_logprobs_backward)
def _backward_flop(grad, h, w, *args, **kwargs) -> int:
    needs = args[-1]
    return ((needs[1] or needs[2]) + needs[1]) * 2 * h[0] * w[0] * w[1]


class _TopkLogprobs(torch.autograd.Function):
    """(N, k + 1) log-probabilities of the student: the k entries, and the tail."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, indices, mask, head, needs, backend):
        logprobs, *rest = torch.ops.fastalign.linear_topk_logprobs(
            hidden, weight, bias, indices, mask, head, needs[0], backend=backend
        )
        ctx.head, ctx.needs, ctx.backend = head, needs, backend
        ctx.save_for_backward(hidden, weight, bias, indices, mask, logprobs, *rest)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        found = torch.ops.fastalign.linear_topk_logprobs_backward(
            grad.contiguous(), *ctx.saved_tensors, ctx.head, ctx.needs, backend=ctx.backend
        )
        return *(g if need else None for g, need in zip(found, ctx.needs, strict=True)), *[None] * 5


def divergence_of_buckets(
    logprobs: Tensor, teacher: Tensor, divergence: str, jsd_beta: float, *, with_tail: bool,
    mask: Tensor | None, token_weights: Tensor | None,
) -> Tensor:  # fmt: skip
    """Per token (N,), from the student's log-probabilities (N, k + 1), the tail last, and the teacher's (N, k)."""
    s = logprobs.double() if with_tail else logprobs[:, :-1].double()
    t = reference.with_tail(teacher.double()) if with_tail else teacher.double()
    if mask is not None:
        s, t = (b.masked_fill(~mask.unsqueeze(1), 0.0) for b in (s, t))
    values = reference.divergence_of_logprobs(s, t, divergence, jsd_beta).to(logprobs.dtype)
    return values if token_weights is None else values * token_weights.detach().to(values.dtype)


def rows_that_count(mask: Tensor | None, token_weights: Tensor | None) -> Tensor | None:
    """(N,) bool: unmasked, and of a weight other than 0; None for all."""
    if token_weights is None:
        return None if mask is None else mask.reshape(-1)
    counts = token_weights.reshape(-1) != 0
    return counts if mask is None else mask.reshape(-1) & counts


def sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tail: str = "lump",
    backend: str = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution from a teacher's top k, per token, from hidden states.

    tail="lump": the `divergence` (as in `linear_divergence`) over k + 1 buckets: the teacher's k entries, and all
    others as one, of the teacher's mass `1 - sum exp(teacher_logprobs)` (at least 1e-7: the sum is rounded). It is at
    most the divergence over the whole vocabulary. tail="drop": the k terms of it alone, unnormalised; not a divergence,
    and it can be negative. Differentiable (once) in hidden, weight and bias; the teacher is a constant.

    hidden: (..., H) floating. weight: (V, H). bias: (V,). teacher_indices: (..., k) int64 in [0, V), distinct in a row.
    teacher_logprobs: (..., k) floating, at the same temperature; -inf where a row has fewer entries.
    mask, token_weights, temperature, jsd_beta, logit_scale, softcap: as in `linear_divergence`.
    backend: "torch" (tiled), "cpu" (C++), "reference" (materialises the logits), or "auto" (picks by device: "cpu" on
        the CPU where it can and is faster, else "torch").

    Returns (...) float32, or float64 for float64 inputs. 2U FLOP forward and backward with a frozen head
    (U = 2 N V H), 4U with a trainable one; extra memory O(rows x (H + k)) + a tile. InputError names a wrong shape,
    dtype, device, index or option; BackendError an unknown backend.
    """
    check_divergence_options(divergence, temperature, jsd_beta, None, "auto")
    check_side("", hidden, weight, bias, softcap)
    shape, k = hidden.shape[:-1], teacher_indices.shape[-1]
    _check_teacher(shape, weight.shape[0], teacher_indices, teacher_logprobs, mask, token_weights)
    check_devices(hidden, weight, bias, teacher_indices, teacher_logprobs, mask, token_weights)
    if tail not in ("lump", "drop"):
        raise InputError(f"tail is {tail!r}; it must be lump or drop")
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; sparse_divergence has {', '.join(BACKENDS)}")
    with_tail = tail == "lump" and k < weight.shape[0]
    if backend == "reference":
        values = reference.sparse_divergence(
            hidden, weight, teacher_indices, teacher_logprobs, bias=bias, mask=mask, divergence=divergence,
            temperature=temperature, jsd_beta=jsd_beta, logit_scale=logit_scale, softcap=softcap, tail=tail,
        )  # fmt: skip
        return values if token_weights is None else values * token_weights.to(values.dtype)
    common = torch.promote_types(hidden.dtype, weight.dtype)
    backend = _resolve(backend, common, hidden, weight, bias)
    kept = rows_that_count(mask, token_weights)
    needs_grad = torch.is_grad_enabled()
    needs = tuple(needs_grad and t is not None and t.requires_grad for t in (hidden, weight, bias))
    logprobs = _TopkLogprobs.apply(
        hidden.to(common).reshape(-1, hidden.shape[-1]), weight.to(common), bias, teacher_indices.reshape(-1, k),
        kept, head_numbers(logit_scale, softcap, temperature), needs, backend,
    )  # fmt: skip
    values = divergence_of_buckets(
        logprobs, teacher_logprobs.detach().reshape(-1, k), divergence, jsd_beta, with_tail=with_tail, mask=kept,
        token_weights=None if token_weights is None else token_weights.reshape(-1),
    )  # fmt: skip
    return values.view(shape)


def _resolve(backend: str, dtype: torch.dtype, *tensors: Tensor | None) -> str:
    """What "auto" stands for here; BackendError where "cpu" was asked for by name and cannot run."""
    if backend == "torch":
        return backend
    why = cpu.why_not(*tensors) or cpu.why_no_kernel("picked")
    if backend == "cpu" or (cpu.refused and tensors[0].device.type == "cpu"):
        if why:
            raise BackendError(f"backend={backend!r} cannot run sparse_divergence here: {cpu.refused or why}")
        return "cpu"
    return "cpu" if why is None and cpu.is_fast(dtype) else "torch"


def _check_teacher(shape: torch.Size, vocab: int, indices: Tensor, logprobs: Tensor, mask, token_weights):
    expected = tuple(shape)
    if indices.dtype != torch.int64:
        raise InputError(f"teacher_indices is {indices.dtype}; it must be int64, call teacher_indices.long()")
    if not logprobs.is_floating_point():
        raise InputError(f"teacher_logprobs is {logprobs.dtype}; it must be floating, call teacher_logprobs.float()")
    if indices.shape != logprobs.shape or tuple(indices.shape[:-1]) != expected or not 0 < indices.shape[-1] <= vocab:
        raise InputError(
            f"teacher_indices is {tuple(indices.shape)} and teacher_logprobs {tuple(logprobs.shape)}; both must be "
            f"{(*expected, 'k')} with k from 1 to {vocab}"
        )
    for name, t in (("mask", mask), ("token_weights", token_weights)):
        if t is not None and tuple(t.shape) != expected:
            raise InputError(f"{name} is {tuple(t.shape)}; it must be {expected}, one per token")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask is {mask.dtype}; it must be bool, write mask != 0")
