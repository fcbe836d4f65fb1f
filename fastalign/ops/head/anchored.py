"""The anchored driver of `linear_logprobs`: whole products over the vocabulary, on GPUs of compute capability 9.0 on.

For one row, with the products u = h W' + bias, the logits z, the target y, slope_j = dz_j / du_j, and logarithms to
base 2 (z2 = z log2 e):

    k       = round(z2_y) + 40                     the anchor, known before the scan over the vocabulary
    e_j     = 2^(z2_j - k), 0 at the target        bfloat16
    others  = sum_j e_j
    S       = others + 2^(z2_y - k)
    A       = sum_j e_j slope_j W[j]               (H,)

    logprob              = -log(1 + others 2^(k - z2_y))
    d logprob / d hidden = (others slope_y W[y] - A) / S
    d logprob / d W[j]   = -e_j slope_j h / S,  at the target  others slope_y h / S

Any k gives the same result, as long as e_j neither overflows nor underflows. `logprobs_tiles.py` takes the running
maximum: it has to see tiles in order, and rescales its sums. Here k depends on the row's own target alone. bfloat16 has
the exponents of float32, so an entry keeps its relative precision from 60 nats below the target (e^-60 of its
probability) to 83 nats above it. Rows with an entry farther above (a target of probability e^-83) are recomputed on the
device with their maximum as the anchor.

**Products.** With U = 2 N V H FLOP: a frozen layer takes 2U, e = exp(h W') and A = e W, both in the forward pass. A
trainable one takes 3U: e is kept, and its gradient is one product, e' ' (c h). The loss's coefficient c goes into the
hidden states (N, H) and not into the exponentials (N, V), and e' is e with `-others` at the target. Rows whose
exponentials do not fit the memory budget are scanned again in the backward pass: 4U.

**Exceptions** are scanned again in the backward pass too, which forms the gradient in u with all coefficients known:
- the entropy: it needs e_j log p_j, which no factor per row makes from e_j;
- float16, which has not the exponents to hold e;
- a bias with a gradient, which is the sum of the rows of the gradient in u.

**Memory.** Rows go in blocks whose e has at most `EXPONENTIALS` bytes.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.backends import anchored as kernels
from fastalign.ops.head.products import accumulate, operand, product
from fastalign.ops.head.rows import ScoredRows, gather_rows, scatter_rows
from fastalign.ops.head.tiling import row_slices
from fastalign.ops.head.transform import LogitTransform

# Most bytes of exponentials that exist at a time, beside those that a trainable layer keeps within its memory budget.
EXPONENTIALS = int(os.environ.get("FASTALIGN_HEAD_MIB", "256")) << 20
_BLOCK = 128  # rows of a block are a multiple of this, the rows of a tile


class Forward(NamedTuple):
    """What the forward pass returns for N rows."""

    logprobs: Tensor  # (N,)
    entropy: Tensor | None  # (N,)
    grad_logprobs: Tensor | None  # (N, H) d logprob / d hidden
    stats: Tensor  # (N, 5), see `finish` of kernels/anchored_logprobs.py
    cache: Tensor | None  # (C, columns) the exponentials of the first C rows


def padded_columns(vocab: int) -> int:
    """How long a row of exponentials is in memory: the copy engine wants rows at multiples of 16 bytes."""
    return vocab + -vocab % 8


def cache_shape(vocab: int) -> tuple[int, int]:
    """How many entries and how many shifts a row of the cache has. There are no shifts: a row has one anchor."""
    return padded_columns(vocab), 0


def block_rows(vocab: int) -> int:
    """How many rows' exponentials fit `EXPONENTIALS` bytes, in whole tiles, and at least one tile."""
    return max(EXPONENTIALS // (2 * padded_columns(vocab)) // _BLOCK, 1) * _BLOCK


def part_columns(rows: int, summed_width: int) -> int:
    """How many vocabulary entries `_scan_again` takes at a time, a multiple of 256.

    The gradient in the products, (rows, entries) in 16 bits, fits `EXPONENTIALS` bytes, and so does the float32 sum of
    the weight's gradient over kept and other rows, (entries, summed_width). That is made where some rows were kept.
    """
    return max(EXPONENTIALS // max(2 * rows, 4 * summed_width) // 256, 1) * 256


def keeps_exponentials(dtype: torch.dtype, bias: Tensor | None, *, entropy: bool) -> bool:
    """Whether the forward pass may keep or use exponentials; see the exceptions at the head of this file."""
    return dtype == torch.bfloat16 and not entropy and not (bias is not None and bias.requires_grad)


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
) -> Forward:
    """Log-probabilities, entropies and, with `grads`, d logprob / d hidden.

    Args:
        hidden: (N, H).
        weight: (V, H) of the same dtype.
        targets: (N,) int64; every target is a token id.
        bias: (V,) or None.
        transform: From products to logits.
        grads: Whether the gradient in hidden is wanted. Needs `keeps_exponentials`.
        entropy: Whether the entropies are wanted.
        cache_rows: How many rows, the first ones, have their exponentials kept. Needs `keeps_exponentials`.
    """
    n, vocab = hidden.shape[0], weight.shape[0]
    columns = padded_columns(vocab)
    cache = hidden.new_empty(cache_rows, columns) if cache_rows else None
    kept = min(cache_rows, n)
    if cache is not None:
        # Nothing reads these, but an op must not return memory that nobody wrote.
        if kept < cache_rows:
            cache[kept:] = 0
        if columns > vocab:
            cache[:, vocab:] = 0
    buffer = hidden.new_empty(min(n, block_rows(vocab)), columns) if grads else None
    blocks = row_slices(kept, max(kept, 1)) if cache is not None else []
    step = max(n, 1) if buffer is None else max(buffer.shape[0], 1)
    blocks += [slice(rows.start + kept, rows.stop + kept) for rows in row_slices(n - kept, step)]
    done = [_forward_block(hidden[:0], weight, targets[:0], bias, transform, None, grads, entropy)] * (n == 0)
    for rows in blocks:
        whole = cache[rows] if cache is not None and rows.stop <= kept else buffer
        e = None if whole is None else whole[: rows.stop - rows.start, :vocab]
        done.append(_forward_block(hidden[rows], weight, targets[rows], bias, transform, e, grads, entropy))
    logprobs, entropies, a, stats = map(_join, zip(*done, strict=True))
    assert logprobs is not None and stats is not None
    return Forward(logprobs, entropies, a, stats, cache)


def _forward_block(hidden, weight, targets, bias, transform, e, grads, entropy) -> tuple[Tensor | None, ...]:
    """Log-probs, entropies, gradients and stats of some rows, whose exponentials go to e if it is not None."""
    layer = kernels.Layer(hidden, weight, targets, bias, transform)
    if hidden.shape[0] == 0:
        logprobs = hidden.new_empty(0, dtype=torch.float32)
        a = logprobs.new_empty(0, hidden.shape[1]) if grads else None
        return logprobs, logprobs.clone() if entropy else None, a, logprobs.new_empty(0, 5)
    sums = kernels.scan(layer, e, entropy=entropy)
    a = product(operand(e), operand(weight)) if grads else None  # (R, H) = e W
    logprobs, entropies, stats = kernels.finish(layer, sums, a=a, e=None if grads else e)
    return logprobs, entropies, a, stats


def _join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """The blocks' rows one after the other."""
    tensors = [part for part in parts if part is not None]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors) if tensors else None


class _Coefficients(NamedTuple):
    """Per row, what the gradient in the products is made from. Each (R,)."""

    scale: Tensor  # of the exponentials that were kept: -g / S times the constant part of dz/du
    lse2: Tensor
    slope_1: Tensor
    slope_2: Tensor | None  # None without a gradient of the entropy
    at_target: Tensor


def _coefficients(g: Tensor, g_entropy: Tensor | None, stats: Tensor, transform: LogitTransform) -> _Coefficients:
    """The gradient in z_j is -p_j (g + g_entropy (log p_j + entropy)), at the target plus g; times dz_j / du_j."""
    lse2, total, doubt, slope_y, entropy = stats.unbind(1)
    slope_1, slope_2, at_target = -g, None, g * doubt
    if g_entropy is not None:
        p_y = 1 - doubt
        slope_1, slope_2 = slope_1 - g_entropy * entropy, -g_entropy * (transform.factor * math.log(2))
        at_target = at_target - g_entropy * (torch.xlogy(p_y, p_y) + p_y * entropy)
    return _Coefficients(
        g * (-transform.factor) / total, lse2.contiguous(), slope_1 * transform.factor, slope_2, at_target * slope_y
    )


def backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    stats: Tensor,
    cache: Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in hidden (N, H) float32, weight (V, H) and bias (V,), where `needs` says so for each.

    2U FLOP for rows whose exponentials were kept, 3U for the others.

    Args:
        grad_logprobs: (N,).
        grad_entropy: (N,) or None.
        hidden: (N, H).
        weight: (V, H).
        targets: (N,).
        bias: (V,) or None.
        transform: From products to logits.
        stats: (N, 5) as `forward` returned them.
        cache: What `forward` returned.
        needs: Which of the three gradients are wanted.
    """
    kept = min(cache.shape[0], hidden.shape[0]) if cache is not None else 0
    c = _coefficients(grad_logprobs, grad_entropy, stats, transform)
    d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
    e = cache[:kept, : weight.shape[0]] if cache is not None else None
    scaled = None  # c h of the kept rows
    if kept and e is not None:
        if d_hidden is not None:
            d_hidden[:kept] = product(operand(e), operand(weight)) * c.scale[:kept, None]
        scaled = (hidden[:kept] * c.scale[:kept, None]).to(hidden.dtype)
        if d_weight is not None and kept == hidden.shape[0]:
            _product_into(d_weight, e, scaled)
    if kept < hidden.shape[0]:
        _scan_again(hidden, weight, targets, bias, transform, c, kept, e, scaled, (d_hidden, d_weight, d_bias))
    elif not hidden.shape[0] and d_weight is not None:
        d_weight.zero_()
    return d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


def _product_into(out: Tensor, e: Tensor, h: Tensor) -> None:
    """Computes out (T, H) = e' h with float32 sums, for e (R, T) and h (R, H)."""
    if out.device.type == "cuda":
        torch.mm(e.t(), h, out=out)
    else:  # the CPU's product of 16-bit operands may round its sums
        out.copy_(operand(e).t() @ operand(h))


def _scan_again(hidden, weight, targets, bias, transform, c, kept, e, scaled, gradients) -> None:
    """The gradients' parts of the rows from `kept` on, one part of the vocabulary after the other.

    All rows are taken at a time, so that a part's gradient in the weight is complete after one product, and no float32
    copy of the whole gradient is needed.
    """
    rows = slice(kept, None)
    d_hidden, d_weight, d_bias = gradients
    n, vocab = hidden.shape[0] - kept, weight.shape[0]
    part = min(part_columns(n, weight.shape[1] if kept else 0), padded_columns(vocab))
    buffer = hidden.new_empty(n, part)
    slope_2 = None if c.slope_2 is None else c.slope_2[rows].contiguous()
    for first in range(0, vocab, part):
        v = slice(first, min(first + part, vocab))
        w, du = weight[v], buffer[:, : v.stop - v.start]
        layer = kernels.Layer(hidden[rows], w, targets[rows], None if bias is None else bias[v], transform)
        at_target, lse2, slope_1 = (t[rows].contiguous() for t in (c.at_target, c.lse2, c.slope_1))
        kernels.gradient(layer, first, lse2, slope_1, slope_2, at_target, du)
        if d_hidden is not None:
            accumulate(d_hidden[rows], operand(du), operand(w))
        if d_bias is not None:
            d_bias[v] = du.sum(0, dtype=torch.float32)
        if d_weight is not None and not kept:
            _product_into(d_weight[v], du, hidden[rows])
        elif d_weight is not None:
            total = product(operand(du).t(), operand(hidden[rows]))
            accumulate(total, operand(e[:, v]).t(), operand(scaled))
            d_weight[v] = total


# The two functions of the op, over all rows of its inputs.


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    scored: ScoredRows,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    *,
    grads: bool,
    entropy: bool,
    cache_rows: int,
) -> tuple[Tensor, ...]:
    """`forward` of the scored rows, whose targets are given; what the schema of the op says, with empty tensors."""
    n, hidden = hidden.shape[0], gather_rows(hidden, scored, pad=False).contiguous()
    bias = None if bias is None else bias.contiguous()
    out = forward(hidden, weight, targets, bias, transform, grads=grads, entropy=entropy, cache_rows=cache_rows)
    empty = out.logprobs.new_empty(0)
    results = out.logprobs, out.entropy, out.grad_logprobs, None, out.stats
    scattered = (empty.clone() if t is None else scatter_rows(t, scored, n) for t in results)
    return *scattered, hidden.new_empty(0) if out.cache is None else out.cache, empty


def linear_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    scored: ScoredRows,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    stats: Tensor,
    cache: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """`backward` of the scored rows; what the schema of the op says, with empty tensors."""

    def rows(t: Tensor) -> Tensor:
        return gather_rows(t, scored, pad=False)

    stats = rows(stats)
    if scored.ignored is not None:
        stats = stats.masked_fill(scored.ignored[:, None], 1.0)  # any number that can be divided by
    d_hidden, d_weight, d_bias = backward(
        rows(grad_logprobs), None if grad_entropy is None else rows(grad_entropy), rows(hidden).contiguous(), weight,
        targets, None if bias is None else bias.contiguous(), transform, stats,
        cache if cache.numel() else None, needs=needs,
    )  # fmt: skip
    empty = hidden.new_empty(0)
    return (
        empty if d_hidden is None else scatter_rows(d_hidden, scored, hidden.shape[0]).to(hidden.dtype),
        empty.clone() if d_weight is None else d_weight,
        empty.clone() if d_bias is None else d_bias,
    )
