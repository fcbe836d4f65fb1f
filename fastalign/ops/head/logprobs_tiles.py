"""The tiled driver of `linear_logprobs`: products by torch, and between them an epilogue in torch, Triton or CUDA.

Logits exist one (rows, vocabulary) tile at a time. Each tile is folded into running statistics per row, with the
target `y` left out of every sum (`'` below), so that `1 - p_y` never comes from a subtraction:

    m   = the running maximum of z            others  = sum' exp(z - m)
    z_y = the target's logit                  zothers = sum' exp(z - m) (z - m)         (entropy only)
    A   = sum' exp(z - m) slope W             B       = sum' exp(z - m) (z - m) slope W (entropy only)

where `slope = dz / d(h W' + b)`. Three results follow. With S = others + exp(z_y - m):

    logprob              = -log(1 + others exp(m - z_y))
    entropy              = log S - E[z - m]
    d logprob / d hidden = (others / S) slope_y W[y] - A / S

None of them depends on m, which may therefore lag behind the maximum. The last one does not depend on the loss, so a
frozen head needs two products per tile and no second look at the logits. A trainable head gets its gradients in
`backward`, from probability tiles kept by `forward` as far as they were allowed to be, and recomputed beyond.

A tile is written by one product, read and overwritten in place by the epilogue, and read by the next product.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head.epilogue import START as _START
from fastalign.ops.head.epilogue import TORCH, Coefficients, Epilogue, Head, Stats, Sums
from fastalign.ops.head.products import accumulate, in_place, operand, product_into
from fastalign.ops.head.rows import ROW_MULTIPLE, padded


class Cache(NamedTuple):
    """Tiles `exp(z - shift) * slope`, targets zeroed, of the first rows: (C, V) and the shifts (C, tiles)."""

    tiles: Tensor
    shifts: Tensor


class Forward(NamedTuple):
    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,), zeros unless asked for
    grad_logprobs: Tensor | None  # (N, H) d logprob / d hidden
    grad_entropy: Tensor | None  # (N, H) d entropy / d hidden
    stats: Stats
    cache: Cache | None


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary entries of one tile: 8 MB of float32 logits on the CPU, a share of the memory on a GPU."""
    if device.type == "cuda":
        return _device_tile_shape(device)
    return (512, 4096) if device.type == "cpu" else (2048, 8192)


@lru_cache
def _device_tile_shape(device: torch.device) -> tuple[int, int]:
    if not torch.cuda.is_available():  # a graph traced for a GPU on a machine without one
        return gpu_tile_shape(16 << 30)
    return gpu_tile_shape(torch.cuda.get_device_properties(device).total_memory)


def gpu_tile_shape(memory_bytes: int) -> tuple[int, int]:
    """Rows and vocabulary entries of a tile for a GPU with so much memory, of which a tile takes a thousandth or 16 MB.

    As many entries as the epilogues take: every tile costs launches, which small models wait for, and the second
    product reads and writes its (R, H) sums once a tile. Rows are a multiple of 128, 256 at least, so that a product
    reads the weight faster than it multiplies, and 2048 at most. Tiles small enough for the second-level cache were
    no faster (bench/LOG.md).
    """
    columns = 16384
    rows = memory_bytes // 1024 // (4 * columns)
    return min(max(rows - rows % 128, 256), 2048), columns


def vocabulary_tiles(vocab: int, device: torch.device) -> list[tuple[int, int]]:
    """The tile boundaries over the vocabulary; their order is fixed, so a token's result is too."""
    step = tile_shape(device)[1]
    return [(start, min(start + step, vocab)) for start in range(0, vocab, step)]


def cacheable_rows(rows: int, row_bytes: int, memory_budget: int) -> int:
    """How many of `rows` have their probabilities kept within the budget: all, or whole multiples, never a cut one."""
    affordable = memory_budget // row_bytes
    return min(padded(rows), affordable - affordable % ROW_MULTIPLE)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    *,
    grads: bool = False,
    entropy: bool = False,
    cache_rows: int = 0,
    epilogue: Epilogue = TORCH,
) -> Forward:
    """Log-probs, entropy and, with `grads`, their gradients in hidden; every target is a real one.

    hidden (N, H) with N a multiple of 16 (`pad_rows`), weight (V, H), targets (N,), bias (V,). Keeps the probability
    tiles of the first `cache_rows` rows. 1U = 2 N V H FLOP without `grads`, 2U with, 3U with the entropy's too.
    """
    n, vocab = hidden.shape[0], weight.shape[0]
    kept = min(cache_rows, n)
    cache = None
    if cache_rows:
        shifts = len(vocabulary_tiles(vocab, hidden.device))
        acc_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        cache = Cache(hidden.new_empty(cache_rows, vocab), hidden.new_empty(cache_rows, shifts, dtype=acc_dtype))
        for t in cache:
            t[kept:] = 0  # promised to the fake, but fewer rows are scored
    blocks = []
    for r0, r1 in row_blocks(n, kept, hidden.device):
        rows = slice(r0, r1)
        part = Cache(cache.tiles[rows], cache.shifts[rows]) if r0 < kept else None
        blocks.append(_scan_rows(hidden[rows], weight, targets[rows], bias, head, grads, entropy, part, epilogue))
    joined = blocks[0]
    if len(blocks) > 1:
        joined = [None if column[0] is None else torch.cat(column) for column in zip(*blocks, strict=True)]
    return Forward(*joined[:4], stats=Stats(*joined[4:]), cache=cache)


def row_blocks(n: int, kept: int, device: torch.device) -> list[tuple[int, int]]:
    """The bounds of the blocks of rows, none of which holds both kept rows and others; no rows are one empty block."""
    bounds = sorted({*range(0, n, tile_shape(device)[0]), min(kept, n), n})
    return list(pairwise(bounds)) or [(0, 0)]


def _scan_rows(h, weight, targets, bias, head, grads, entropy, cache, epilogue):
    """Fold the whole vocabulary into the statistics of one block of rows (R, H); see the head of this file."""
    dtype, h = h.dtype, operand(h)
    acc_dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    sums = h.new_zeros(4, h.shape[0], dtype=acc_dtype)
    sums[0].fill_(_START)
    sums = Sums(*sums.unbind(0))
    a = torch.zeros_like(h, dtype=acc_dtype) if grads else None  # (R, H)
    b = torch.zeros_like(a) if grads and entropy else None  # (R, H)
    width = min(weight.shape[0], tile_shape(h.device)[1])
    dtype = dtype if epilogue.low_precision else acc_dtype
    buffer = h.new_empty(h.shape[0], width, dtype=acc_dtype)
    second = None if b is None else torch.empty_like(buffer, dtype=dtype)
    u, low = buffer, in_place(buffer, dtype)

    for i, w in enumerate(weight.split(width)):
        v0, v1 = i * width, i * width + w.shape[0]
        if v1 - v0 < width:
            u, low = buffer[:, : v1 - v0], low[:, : v1 - v0]
        w = operand(w)  # (T, H)
        product_into(h, w.t(), u)  # (R, T)
        # A kernel stores e even where nobody reads it: it is the same one then, and so are the bits of the log-probs.
        e, ze = low if grads or epilogue.low_precision else None, None
        if cache is not None:
            e = cache.tiles[:, v0:v1]
        elif b is not None:
            e, ze = second[:, : v1 - v0], low
        epilogue.absorb(
            u, targets, v0, None if bias is None else bias[v0:v1], head, sums, entropy=entropy, e=e, ze=ze, a=a, b=b
        )
        if a is not None:
            accumulate(a, e, w)
        if b is not None:
            accumulate(b, ze, w)
        if cache is not None:
            cache.shifts[:, i] = sums.shift

    logprobs, entropies, stats = epilogue.finish(weight, targets, head, sums, entropy=entropy, a=a, b=b)
    return logprobs, entropies, a, b, *stats


def backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    stats: Stats,
    cache: Cache | None,
    *,
    needs: tuple[bool, bool, bool],
    epilogue: Epilogue = TORCH,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in hidden (N, H), weight (V, H) and bias (V,), as far as `needs` asks for each.

    2U FLOP where tiles were kept, 3U where the logits are recomputed. The weight's gradient is accumulated in
    float32 and leaves in the weight's dtype, one vocabulary tile after the other.
    """
    acc_dtype = stats.shift.dtype
    d_hidden = torch.zeros_like(hidden, dtype=acc_dtype) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    d_bias = torch.empty_like(bias) if needs[2] else None
    coefficients = _coefficients(stats, grad_logprobs, grad_entropy)
    kept = 0 if cache is None or grad_entropy is not None else min(cache.tiles.shape[0], hidden.shape[0])
    if kept:
        scales = _kept_scales(cache.shifts[:kept], stats, coefficients, head)  # (tiles, kept)
    blocks = row_blocks(hidden.shape[0], kept, hidden.device)
    width = min(weight.shape[0], tile_shape(hidden.device)[1])
    buffer = hidden.new_empty(max(r1 - r0 for r0, r1 in blocks), width, dtype=acc_dtype)
    dtype = hidden.dtype if epilogue.low_precision else acc_dtype
    for i, (v0, v1) in enumerate(vocabulary_tiles(weight.shape[0], hidden.device)):
        w = operand(weight[v0:v1])  # (T, H)
        dw = torch.zeros_like(w, dtype=acc_dtype) if needs[1] else None
        db = torch.zeros(v1 - v0, dtype=acc_dtype, device=w.device)
        for r0, r1 in blocks:
            rows = slice(r0, r1)
            h = operand(hidden[rows])
            u = buffer[: r1 - r0, : v1 - v0]
            du = in_place(u, dtype)
            if r0 < kept:
                epilogue.kept_gradient(
                    cache.tiles[rows, v0:v1], targets[rows], v0, scales[i, rows], coefficients.target[rows], du
                )
            else:
                part = None if bias is None else bias[v0:v1]
                epilogue.softmax_gradient(
                    product_into(h, w.t(), u), targets[rows], v0, part, head, coefficients.rows(rows), du
                )
            if d_hidden is not None:
                accumulate(d_hidden[rows], du, w)
            if dw is not None:
                accumulate(dw, du.t(), h)
            if needs[2]:
                db += du.sum(0, dtype=acc_dtype)
        if dw is not None:
            d_weight[v0:v1] = dw
        if needs[2]:
            d_bias[v0:v1] = db
    return d_hidden, d_weight, d_bias


def _coefficients(stats: Stats, g_logprobs: Tensor, g_entropy: Tensor | None) -> Coefficients:
    """The gradient in u is `-p (g_logprobs + g_entropy (z - E[z])) slope`, but `g_logprobs (1 - p_y) slope_y`
    (+ entropy term) at the target.
    """
    total = stats.others + stats.target
    target = g_logprobs * (stats.others / total)
    if g_entropy is not None:
        p_y = stats.target / total
        target = target - g_entropy * p_y * (stats.target.log().clamp(min=_START) - stats.mean)
    return Coefficients(
        stats.shift, stats.mean, -g_logprobs / total, None if g_entropy is None else -g_entropy / total,
        target * stats.slope,
    )  # fmt: skip


def _kept_scales(shifts: Tensor, stats: Stats, c: Coefficients, head: Head) -> Tensor:
    """What a kept tile `exp(z - shift then)` is multiplied with, per vocabulary tile and row: (tiles, C)."""
    kept = shifts.shape[0]
    scale = c.logprobs[:kept] * (head.factor if head.softcap is None else 1.0)
    return (shifts.t().contiguous() - stats.shift[:kept]).exp_().mul_(scale)
