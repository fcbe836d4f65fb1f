"""The tiled driver of `linear_logprobs`: products by torch, and between them an epilogue in torch, Triton or CUDA.

The C++ kernel for CPUs does the same by itself (csrc/cpu/kernels/linear_logprobs-inl.h) and does not use this file.

Logits exist one (rows, vocabulary) tile at a time. The first product, hidden states times a tile of the weight,
writes the tile. The epilogue reads it, folds it into running statistics per row, and overwrites it in place with
exponentials. The second product, exponentials times the same tile of the weight, adds to the gradient. For one row:

    u       = h W^T + bias                the first product; the epilogue adds the bias, (V,)
    z       = the logits, made from u by scale, soft cap and temperature
    slope_j = dz_j / du_j                 slope_y is that of the target y
    m       = a shift near the maximum of the z seen so far

    others  = sum_{j != y} exp(z_j - m)
    zothers = sum_{j != y} exp(z_j - m) (z_j - m)                  for the entropy only
    A       = sum_{j != y} exp(z_j - m) slope_j W[j]               (H,)
    B       = sum_{j != y} exp(z_j - m) (z_j - m) slope_j W[j]     (H,), for the entropy only

Every sum leaves out the target, so that `1 - p_y` never comes from a subtraction, which would lose its digits where p_y
is near 1. Without a soft cap all slopes are the same constant. The code then leaves the slope out of A, B and the
cached tiles, and multiplies by it at the end: A and B in `epilogue.finish`, cached tiles in `_cached_scales`.

The results follow. With S = others + exp(z_y - m), p_y = exp(z_y - m) / S and the mean over the whole vocabulary
E[z - m] = (zothers + exp(z_y - m) (z_y - m)) / S:

    logprob              = -log(1 + others exp(m - z_y))
    entropy              = log S - E[z - m]
    d logprob / d hidden = (others / S) slope_y W[y] - A / S
    d entropy / d hidden = (E[z - m] A - B) / S - p_y (z_y - m - E[z - m]) slope_y W[y]

None of them depends on m, so m may lag behind the maximum (lazy rescaling, see `epilogue.Sums`).

**One pass.** d logprob / d hidden does not depend on the loss. With a frozen output layer the forward pass therefore
computes loss and gradient together: two products per tile, and no second look at the logits. A trainable output layer
gets its gradients in `backward`, from the probability tiles that `forward` cached as far as its budget allowed, and
from recomputed logits beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head import tiling
from fastalign.ops.head.epilogue import TORCH, Coefficients, Epilogue, Stats, Sums
from fastalign.ops.head.products import accumulate, in_place, operand, product_into
from fastalign.ops.head.tiling import ROW_MULTIPLE, START, round_up_rows, vocabulary_tiles
from fastalign.ops.head.transform import LogitTransform


class Cache(NamedTuple):
    """Cached tiles of the first C rows, for the backward pass of a trainable output layer."""

    tiles: Tensor  # (C, V) exp(z - shift), 0 at the target; under a soft cap times the slope
    shifts: Tensor  # (C, tiles) the shift at the time when each tile was written


class LogprobsForward(NamedTuple):
    """What the forward pass returns for N rows."""

    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,), zeros unless wanted
    grad_logprobs: Tensor | None  # (N, H) d logprob / d hidden
    grad_entropy: Tensor | None  # (N, H) d entropy / d hidden
    stats: Stats
    cache: Cache | None


def cacheable_rows(rows: int, row_bytes: int, memory_budget: int) -> int:
    """How many rows have their probabilities cached within the budget.

    That is all `rows` (rounded up to a multiple of 16), or as many as fit, rounded down to a multiple of 16.
    """
    affordable = memory_budget // row_bytes
    return min(round_up_rows(rows), affordable - affordable % ROW_MULTIPLE)


def cache_shifts(vocab: int, device: torch.device) -> int:
    """How many shifts a cached row has: one per vocabulary tile."""
    return len(vocabulary_tiles(vocab, tiling.logprobs_tile_shape(device)[1]))


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    *,
    grads: bool = False,
    entropy: bool = False,
    cache_rows: int = 0,
    epilogue: Epilogue = TORCH,
) -> LogprobsForward:
    """Log-probabilities, entropies and, with `grads`, their gradients with respect to hidden.

    One product takes 2 N V H FLOP. There is one without `grads`, two with them, three with those of the entropy too.

    Args:
        hidden: (N, H) with N a multiple of 16 (`pad_rows`).
        weight: (V, H).
        targets: (N,) int64; every target is a token id.
        bias: (V,) or None.
        transform: From products to logits.
        grads: Whether the gradients with respect to hidden are wanted.
        entropy: Whether the entropies are wanted.
        cache_rows: How many rows, the first ones, have their probability tiles cached.
        epilogue: What runs between the products.
    """
    n, vocab = hidden.shape[0], weight.shape[0]
    kept = min(cache_rows, n)
    cache = None
    if cache_rows:
        shifts = cache_shifts(vocab, hidden.device)
        acc_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        cache = Cache(hidden.new_empty(cache_rows, vocab), hidden.new_empty(cache_rows, shifts, dtype=acc_dtype))
        for t in cache:
            # The shape-only implementation of the op returns `cache_rows` rows, so this one must too. Where fewer rows
            # are scored, the rest is zeros.
            t[kept:] = 0
    blocks = []
    for r0, r1 in row_blocks(n, kept, hidden.device):
        rows = slice(r0, r1)
        block_cache = Cache(cache.tiles[rows], cache.shifts[rows]) if cache is not None and r0 < kept else None
        block = _fold_vocabulary(
            hidden[rows], weight, targets[rows], bias, transform, grads=grads, entropy=entropy, cache=block_cache,
            epilogue=epilogue,
        )  # fmt: skip
        blocks.append(block)
    return _join(blocks)._replace(cache=cache)


def _join(blocks: list[LogprobsForward]) -> LogprobsForward:
    """The blocks' rows one after the other."""
    if len(blocks) == 1:
        return blocks[0]
    grad_logprobs = [block.grad_logprobs for block in blocks if block.grad_logprobs is not None]
    grad_entropy = [block.grad_entropy for block in blocks if block.grad_entropy is not None]
    return LogprobsForward(
        torch.cat([block.logprobs for block in blocks]),
        torch.cat([block.entropy for block in blocks]),
        torch.cat(grad_logprobs) if grad_logprobs else None,
        torch.cat(grad_entropy) if grad_entropy else None,
        Stats(*map(torch.cat, zip(*(block.stats for block in blocks), strict=True))),
        None,
    )


def row_blocks(n: int, kept: int, device: torch.device) -> list[tuple[int, int]]:
    """The bounds of the blocks of rows: a block's rows are either all cached or none. No rows make one empty block."""
    bounds = sorted({*range(0, n, tiling.logprobs_tile_shape(device)[0]), min(kept, n), n})
    return list(pairwise(bounds)) or [(0, 0)]


def _fold_vocabulary(
    h: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (R,)
    bias: Tensor | None,  # (V,)
    transform: LogitTransform,
    *,
    grads: bool,
    entropy: bool,
    cache: Cache | None,  # of these rows: (R, V) and (R, tiles)
    epilogue: Epilogue,
) -> LogprobsForward:
    """Fold the whole vocabulary into the statistics of one block of rows, as this file's docstring defines them."""
    dtype, h = h.dtype, operand(h)
    acc_dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    sums = h.new_zeros(4, h.shape[0], dtype=acc_dtype)
    sums[0].fill_(START)
    sums = Sums(*sums.unbind(0))
    a = torch.zeros_like(h, dtype=acc_dtype) if grads else None  # (R, H)
    b = torch.zeros_like(a) if a is not None and entropy else None  # (R, H)
    width = min(weight.shape[0], tiling.logprobs_tile_shape(h.device)[1])
    dtype = dtype if epilogue.low_precision else acc_dtype
    # One buffer serves all tiles. `low` is the same memory in the dtype of the second product's operand.
    buffer = h.new_empty(h.shape[0], width, dtype=acc_dtype)
    second = None if b is None else torch.empty_like(buffer, dtype=dtype)
    u, low = buffer, in_place(buffer, dtype)

    for i, tile in enumerate(weight.split(width)):
        v0, v1 = i * width, i * width + tile.shape[0]
        if v1 - v0 < width:
            u, low = buffer[:, : v1 - v0], low[:, : v1 - v0]
        w = operand(tile)  # (T, H)
        product_into(h, w.t(), u)  # (R, T)
        # `e` receives exp(z - shift), `ze` that times (z - shift): the operands of the second products. GPU kernels
        # always store e, even if nothing reads it. So the same compiled kernel runs with and without gradients, and the
        # log-probabilities have the same bits. The epilogue in torch stores it only where it is read.
        e, ze = low if grads or epilogue.low_precision else None, None
        if cache is not None:
            e = cache.tiles[:, v0:v1]
        elif second is not None:
            e, ze = second[:, : v1 - v0], low
        tile_bias = None if bias is None else bias[v0:v1]
        epilogue.absorb(u, targets, v0, tile_bias, transform, sums, entropy=entropy, e=e, ze=ze, a=a, b=b)
        if a is not None and e is not None:
            accumulate(a, e, w)
        if b is not None and ze is not None:
            accumulate(b, ze, w)
        if cache is not None:
            cache.shifts[:, i] = sums.shift

    logprobs, entropies, stats = epilogue.finish(weight, targets, transform, sums, entropy=entropy, a=a, b=b)
    return LogprobsForward(logprobs, entropies, a, b, stats, None)


def backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    stats: Stats,
    cache: Cache | None,
    *,
    needs: Sequence[bool],
    epilogue: Epilogue = TORCH,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to hidden (N, H), weight (V, H) and bias (V,), where `needs` says so for each.

    Two products where tiles were cached, three where the logits are recomputed. The weight's gradient is accumulated in
    float32 and converted to the weight's dtype, one vocabulary tile after the other.

    Args:
        grad_logprobs: (N,).
        grad_entropy: (N,) or None.
        hidden: (N, H), padded as in `forward`.
        weight: (V, H).
        targets: (N,).
        bias: (V,) or None.
        transform: From products to logits.
        stats: What `forward` returned.
        cache: What `forward` returned. It does not serve the entropy's gradient, which needs the logits themselves.
        needs: Which of the three gradients are wanted.
        epilogue: What runs between the products.
    """
    acc_dtype = stats.shift.dtype
    d_hidden = torch.zeros_like(hidden, dtype=acc_dtype) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    d_bias = torch.empty_like(bias) if bias is not None and needs[2] else None
    coefficients = gradient_coefficients(stats, grad_logprobs, grad_entropy)
    kept, scales = 0, None
    if cache is not None and grad_entropy is None:
        kept = min(cache.tiles.shape[0], hidden.shape[0])
        scales = _cached_scales(cache.shifts[:kept], stats, coefficients, transform)  # (tiles, kept)
    blocks = row_blocks(hidden.shape[0], kept, hidden.device)
    width = min(weight.shape[0], tiling.logprobs_tile_shape(hidden.device)[1])
    buffer = hidden.new_empty(max(r1 - r0 for r0, r1 in blocks), width, dtype=acc_dtype)
    dtype = hidden.dtype if epilogue.low_precision else acc_dtype
    for i, (v0, v1) in enumerate(vocabulary_tiles(weight.shape[0], width)):
        w = operand(weight[v0:v1])  # (T, H)
        dw = torch.zeros_like(w, dtype=acc_dtype) if d_weight is not None else None
        db = torch.zeros(v1 - v0, dtype=acc_dtype, device=w.device)
        tile_bias = None if bias is None else bias[v0:v1]
        for r0, r1 in blocks:
            rows = slice(r0, r1)
            h = operand(hidden[rows])
            u = buffer[: r1 - r0, : v1 - v0]
            du = in_place(u, dtype)
            c = coefficients.rows(rows)
            if cache is not None and scales is not None and r0 < kept:
                epilogue.kept_gradient(cache.tiles[rows, v0:v1], targets[rows], v0, scales[i, rows], c.target, du)
            else:
                epilogue.softmax_gradient(product_into(h, w.t(), u), targets[rows], v0, tile_bias, transform, c, du)
            if d_hidden is not None:
                accumulate(d_hidden[rows], du, w)
            if dw is not None:
                accumulate(dw, du.t(), h)
            if d_bias is not None:
                db += du.sum(0, dtype=acc_dtype)
        if d_weight is not None and dw is not None:
            d_weight[v0:v1] = dw
        if d_bias is not None:
            d_bias[v0:v1] = db
    return d_hidden, d_weight, d_bias


def gradient_coefficients(stats: Stats, g_logprobs: Tensor, g_entropy: Tensor | None) -> Coefficients:
    """What `softmax_gradient` needs per row.

    The gradient in u is `-p (g_logprobs + g_entropy (z - E[z])) slope`, but at the target it is
    `g_logprobs (1 - p_y) slope_y` plus the entropy's term.
    """
    total = stats.others + stats.target
    target = g_logprobs * (stats.others / total)
    if g_entropy is not None:
        p_y = stats.target / total
        target = target - g_entropy * p_y * (stats.target.log().clamp(min=START) - stats.mean)
    return Coefficients(
        stats.shift, stats.mean, -g_logprobs / total, None if g_entropy is None else -g_entropy / total,
        target * stats.slope,
    )  # fmt: skip


def _cached_scales(shifts: Tensor, stats: Stats, c: Coefficients, transform: LogitTransform) -> Tensor:
    """What a cached tile is multiplied with, per vocabulary tile and row: (tiles, C).

    The tile holds `exp(z - shift at that time)`, so the factor also takes it to the final shift.
    """
    kept = shifts.shape[0]
    scale = c.logprob_factor[:kept] * (transform.factor if transform.softcap is None else 1.0)
    return (shifts.t().contiguous() - stats.shift[:kept]).exp_().mul_(scale)
