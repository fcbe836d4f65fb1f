"""The tiled driver of `linear_divergence`: any device, any dtype. The arithmetic is in `divergence_terms.py`.

**How many products.** The gradient in the logits needs both normalisers and the moment K, which are known after the
whole vocabulary only. Folding running exponentials as `logprobs_tiles.py` does would have to keep E_s[W] and E_t[W]
(and E_s[x W]) separately: two folds. For the jsd it would not work at all, because log m needs the normalisers first.
Forming the logits twice costs two products more. So instead the logits of both sides are held for as many rows at a
time as fit a constant number of bytes:

    student logits + teacher logits                         once, held; the normalisers on the way
    values, moments                                         elementwise over what is held
    fold c W into (rows, H)                                 the third product

So with U = 2 N V H of the student and T of the teacher: U + T without gradients, and 2U + T with a frozen output layer,
for all three divergences. A trainable output layer takes another 2U + T in `backward`, which forms c again, or 3U + T
in all where the rows' coefficients are known in `forward`. Extra memory is the budget and a tile, whatever V is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head import tiling
from fastalign.ops.head.divergence_terms import RULED_OUT, DivergenceKind, LogSumExp, gradient, gradient_scale, terms
from fastalign.ops.head.products import accumulate, in_place, operand, product
from fastalign.ops.head.tiling import ROW_MULTIPLE, START, round_up_rows, row_slices, vocabulary_tiles
from fastalign.ops.head.transform import LogitTransform


class Side(NamedTuple):
    """Student or teacher: hidden states and the output layer that turns them into logits."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    transform: LogitTransform

    def block(self, rows: slice) -> Side:
        """The same with some rows of hidden, in the dtype of the products."""
        return self._replace(hidden=operand(self.hidden[rows]))


class DivergenceEpilogue(NamedTuple):
    """What a GPU backend does to tiles between products; kernels/linear_divergence.py documents each function."""

    normalise: Callable[..., None]  # (z, bias, transform, top, total)
    terms: Callable[..., None]  # (a, b, stats, kind, beta, transform, values, moments)
    gradient: Callable[..., None]  # (a, b, moments, scale, coefficients, out)


class DivergenceForward(NamedTuple):
    """What the forward pass returns for N rows."""

    values: Tensor  # (N,)
    grad_hidden: Tensor | None  # (N, H) d value / d hidden
    stats: Tensor  # (N, 5): maximum and log-sum of the student, then of the teacher, and K; enough to form c again
    d_weight: Tensor | None  # (V, H) of sum(coefficients * values)
    d_bias: Tensor | None  # (V,)


def default_budget(device: torch.device) -> int:
    """Bytes of held logits when the caller names no budget."""
    return (128 if device.type == "cpu" else 1024) << 20


def block_rows(rows: int, vocab: int, element: int, budget: int, device: torch.device) -> int:
    """How many rows' logits, of both sides, fit the budget: a multiple of 16, at least 16, and as even as possible."""
    fit = min(budget // (2 * vocab * element), tiling.divergence_tile_shape(device)[0])
    fit = max(fit - fit % ROW_MULTIPLE, ROW_MULTIPLE)
    even = -(-rows // max(-(-rows // fit), 1))
    return max(round_up_rows(even), ROW_MULTIPLE)


def _tiles(vocab: int, device: torch.device) -> list[tuple[int, int]]:
    return vocabulary_tiles(vocab, tiling.divergence_tile_shape(device)[1])


def project(side: Side, v0: int, v1: int, out: Tensor) -> Tensor:
    """The logits of one tile into `out` (R, T). Entries that the bias rules out (-inf) become finite."""
    multiply(side, v0, v1, out)
    if side.bias is not None:
        out.add_(side.bias[v0:v1]).clamp_(min=START)
    return side.transform.logits_(out)


def multiply(side: Side, v0: int, v1: int, out: Tensor) -> Tensor:
    """The products of one tile into `out` (R, T)."""
    w = operand(side.weight[v0:v1])  # (T, H)
    if w.dtype == out.dtype:
        return torch.mm(side.hidden, w.t(), out=out)
    if out.dtype == torch.float32:
        return torch.mm(side.hidden, w.t(), out_dtype=out.dtype, out=out)
    return out.copy_(product(side.hidden, w.t()))


class _LogitBuffers:
    """Room for the logits of one block of rows on both sides, and for scratch. Each tile (R, T) is contiguous."""

    def __init__(self, rows: int, vocab: int, width: int, like: Tensor):
        self.student, self.teacher = like.new_empty(rows * vocab), like.new_empty(rows * vocab)
        self.spare = like.new_empty(2, rows * min(width, vocab))

    def tile(self, rows: int, v0: int, v1: int) -> tuple[Tensor, Tensor]:
        """The tiles (R, T) of student and teacher with entries v0 to v1 of the vocabulary."""
        places = slice(rows * v0, rows * v1)
        return self.student[places].view(rows, v1 - v0), self.teacher[places].view(rows, v1 - v0)

    def scratch(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Two more tiles (R, T)."""
        return self.spare[0, : rows * width].view(rows, width), self.spare[1, : rows * width].view(rows, width)


def forward(
    student: Side,
    teacher: Side,
    kind: DivergenceKind,
    *,
    grads: bool,
    coefficients: Tensor | None = None,
    needs: tuple[bool, bool] = (False, False),
    budget: int,
    epilogue: DivergenceEpilogue | None = None,
) -> DivergenceForward:
    """Divergences of N rows, and gradients.

    Args:
        student: N must be a multiple of 16 (`pad_rows`).
        teacher: Of the same N and V.
        kind: Which divergence.
        grads: Whether the gradients of the values in the student's hidden states are wanted.
        coefficients: (N,), or None where they are not known yet.
        needs: Which gradients of `sum(coefficients * values)`, in the student's weight and bias, are wanted.
        budget: Bytes of logits to hold at a time.
        epilogue: What a GPU backend runs between the products; None for plain torch.
    """
    (n, width), vocab = student.hidden.shape, student.weight.shape[0]
    wide = torch.float64 in (student.hidden.dtype, teacher.hidden.dtype)
    like = student.hidden.new_empty(0, dtype=torch.float64 if wide else torch.float32)
    rows = block_rows(n, vocab, like.element_size(), budget, like.device)
    buffers = _LogitBuffers(min(rows, n), vocab, tiling.divergence_tile_shape(like.device)[1], like)
    values, stats = like.new_empty(n), like.new_zeros(n, 5)
    grad_hidden = like.new_zeros(n, width) if grads else None
    d_weight = like.new_zeros(vocab, width) if needs[0] else None
    d_bias = like.new_zeros(vocab) if needs[1] else None
    for block in row_slices(n, rows):
        sides = student.block(block), teacher.block(block)
        values[block] = _values_of_block(*sides, kind, buffers, stats[block], epilogue)
        for v0, v1 in _tiles(vocab, like.device) if grads or any(needs) else ():
            a, b = buffers.tile(sides[0].hidden.shape[0], v0, v1)
            if epilogue is None:
                c = gradient(a, b, stats[block, 4], kind, student.transform)
            else:
                c = _gradient_by_epilogue(epilogue, (a, b), stats[block], kind, student, None)
            if grad_hidden is not None:
                accumulate(grad_hidden[block], c, operand(student.weight[v0:v1]))
            if coefficients is not None and any(needs):
                c.mul_(coefficients[block].unsqueeze(1))
                add_head_gradients(c, sides[0].hidden, d_weight, d_bias, slice(v0, v1))
    return DivergenceForward(values, grad_hidden, stats, d_weight, d_bias)


def _values_of_block(
    student: Side,
    teacher: Side,
    kind: DivergenceKind,
    buffers: _LogitBuffers,
    stats: Tensor,
    epilogue: DivergenceEpilogue | None,
) -> Tensor:
    """Values (R,) of one block of rows. Fills in stats (R, 5), and leaves in the buffers what `gradient` needs."""
    rows, vocab = student.hidden.shape[0], student.weight.shape[0]
    sums = LogSumExp(rows, stats), LogSumExp(rows, stats)
    tiles = _tiles(vocab, stats.device)
    for v0, v1 in tiles:
        for side, z, total in zip((student, teacher), buffers.tile(rows, v0, v1), sums, strict=True):
            if epilogue is None:
                total.absorb(project(side, v0, v1, z), buffers.scratch(rows, v1 - v0)[0])
            else:
                bias = None if side.bias is None else side.bias[v0:v1]
                epilogue.normalise(multiply(side, v0, v1, z), bias, side.transform, total.top, total.total)
    for i, total in enumerate(sums):
        stats[:, 2 * i], stats[:, 2 * i + 1] = total.top, total.total.log()
    values, moments = stats.new_zeros(rows), stats.new_zeros(rows)
    for v0, v1 in tiles:
        a, b = buffers.tile(rows, v0, v1)
        if epilogue is not None:
            epilogue.terms(a, b, stats, kind.name, kind.beta, student.transform, values, moments)
            continue
        value, moment = terms(a, b, stats, kind, student.transform, buffers.scratch(rows, v1 - v0))
        values += value
        if moment is not None:
            moments += moment
    stats[:, 4] = moments
    return values.masked_fill_(values > RULED_OUT, float("inf"))


def add_head_gradients(
    c: Tensor, hidden: Tensor, d_weight: Tensor | None, d_bias: Tensor | None, entries: slice
) -> None:
    """Add what a tile's gradient c (R, T) contributes to some entries of d_weight (V, H) and d_bias (V,)."""
    if d_weight is not None:
        accumulate(d_weight[entries], c.t(), hidden)
    if d_bias is not None:
        d_bias[entries] += c.sum(0)


def backward(
    coefficients: Tensor,
    student: Side,
    teacher: Side,
    kind: DivergenceKind,
    stats: Tensor,
    *,
    needs: Sequence[bool],
    epilogue: DivergenceEpilogue | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `sum(coefficients * values)` in the student's weight (V, H) and bias (V,), from fresh logits.

    2U + T FLOP. The gradients are accumulated in float32, one vocabulary tile after the other, and returned in the
    dtypes of weight and bias.
    """
    n, vocab = student.hidden.shape[0], student.weight.shape[0]
    step, width = tiling.divergence_tile_shape(stats.device)
    buffers = _LogitBuffers(min(step, n), min(width, vocab), width, stats)
    d_weight = torch.empty_like(student.weight) if needs[0] else None
    d_bias = torch.empty_like(student.bias) if student.bias is not None and needs[1] else None
    for v0, v1 in vocabulary_tiles(vocab, width):
        dw = None if d_weight is None else stats.new_zeros(v1 - v0, student.weight.shape[1])
        db = None if d_bias is None else stats.new_zeros(v1 - v0)
        for block in row_slices(n, step):
            sides, rows = (student.block(block), teacher.block(block)), block.stop - block.start
            a, b = buffers.tile(rows, 0, v1 - v0)
            if epilogue is None:
                for side, z in zip(sides, (a, b), strict=True):
                    project(side, v0, v1, z)
                terms(a, b, stats[block], kind, student.transform, buffers.scratch(rows, v1 - v0))
                c = gradient(a, b, stats[block, 4], kind, student.transform).mul_(coefficients[block].unsqueeze(1))
            else:
                _terms_by_epilogue(epilogue, sides, slice(v0, v1), (a, b), stats[block], kind)
                c = _gradient_by_epilogue(
                    epilogue, (a, b), stats[block], kind, student, coefficients[block].contiguous()
                )
            add_head_gradients(c, sides[0].hidden, dw, db, slice(None))
        if d_weight is not None and dw is not None:
            d_weight[v0:v1] = dw
        if d_bias is not None and db is not None:
            d_bias[v0:v1] = db
    return d_weight, d_bias


def _gradient_by_epilogue(
    epilogue: DivergenceEpilogue,
    tile: tuple[Tensor, Tensor],
    stats: Tensor,
    kind: DivergenceKind,
    student: Side,
    coefficients: Tensor | None,
) -> Tensor:
    """The gradient (R, T) of one tile in the dtype of the product that follows, in the memory of the tile."""
    a, b = tile
    c = in_place(a, student.hidden.dtype)
    second = None if kind.name == "forward_kl" else b
    epilogue.gradient(a, second, stats[:, 4].contiguous(), gradient_scale(kind, student.transform), coefficients, c)
    return c


def _terms_by_epilogue(
    epilogue: DivergenceEpilogue,
    sides: tuple[Side, Side],
    entries: slice,
    tile: tuple[Tensor, Tensor],
    stats: Tensor,
    kind: DivergenceKind,
) -> None:
    """What `_values_of_block` leaves of one tile, from fresh products. The sums it takes are known already."""
    unused = torch.empty(2, stats.shape[0], device=stats.device)
    for side, z in zip(sides, tile, strict=True):
        bias = None if side.bias is None else side.bias[entries]
        epilogue.normalise(multiply(side, entries.start, entries.stop, z), bias, side.transform, unused[0], unused[1])
    epilogue.terms(*tile, stats, kind.name, kind.beta, sides[0].transform, unused[0], unused[1])
