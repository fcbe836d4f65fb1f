"""The tiled driver of `linear_logprobs` in plain PyTorch: any device, any dtype.

Logits exist one (rows, vocabulary) tile at a time. Each tile is folded into running statistics per row, with the
target `y` left out of every sum (`'` below), so that `1 - p_y` never comes from a subtraction:

    m   = the running maximum of z            others  = sum' exp(z - m)
    z_y = the target's logit                  zothers = sum' exp(z - m) (z - m)         (entropy only)
    A   = sum' exp(z - m) slope W             B       = sum' exp(z - m) (z - m) slope W (entropy only)

where `slope = dz / d(h W' + b)`. Three results follow. With S = others + exp(z_y - m):

    logprob              = -log(1 + others exp(m - z_y))
    entropy              = log S - E[z - m]
    d logprob / d hidden = (others / S) slope_y W[y] - A / S

The last one does not depend on the loss, so a frozen head needs two products per tile and no second look at the
logits. A trainable head gets its gradients in `backward`, from probability tiles kept by `forward` as far as they
were allowed to be, and recomputed beyond.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Far below any logit, yet finite, so that (start - m) * 0 is 0 and not NaN on the first tile.
_START = -1e30
# BLAS libraries take other code paths, with other rounding, for a handful of rows; whole multiples of this many
# rows all give a row the same bits (measured with MKL from 8 rows on).
_ROW_MULTIPLE = 16


class Head(NamedTuple):
    """What turns `u = h W' + b` into logits: `z = softcap * tanh(logit_scale * u / softcap) / temperature`."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        return self.logit_scale / self.temperature


class Stats(NamedTuple):
    """Per row, after the whole vocabulary: enough to rebuild any probability from its logit. Shapes (N,)."""

    shift: Tensor  # m, the maximum
    others: Tensor  # sum over the vocabulary without the target of exp(z - m)
    target: Tensor  # exp(z_y - m)
    slope: Tensor  # dz/du at the target
    mean: Tensor  # E[z - m], 0 unless the entropy was asked for


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
    """Rows and vocabulary entries of one tile: 8 MB of float32 logits on the CPU, 64 MB elsewhere."""
    return (512, 4096) if device.type == "cpu" else (2048, 8192)


def vocabulary_tiles(vocab: int, device: torch.device) -> list[tuple[int, int]]:
    """The tile boundaries over the vocabulary; their order is fixed, so a token's result is too."""
    step = tile_shape(device)[1]
    return [(start, min(start + step, vocab)) for start in range(0, vocab, step)]


def _operand(t: Tensor) -> Tensor:
    """What enters a product: only CUDA multiplies low precision with a float32 result, elsewhere it is upcast."""
    low = t.dtype in (torch.bfloat16, torch.float16)
    return t.float() if low and t.device.type != "cuda" else t


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, accumulated and returned in float32 (float64 for float64); `a` is cast to b's dtype."""
    if b.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _accumulate(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """`acc += a @ b` in acc's dtype."""
    if b.dtype == acc.dtype:
        acc.addmm_(a, b)
    else:
        acc.add_(_mm(a, b))


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """One tile of logits (R, T), and its slope dz/du where that varies (soft cap), else None."""
    u = _mm(h, w.t())
    if bias is not None:
        u += bias
    if head.softcap is None:
        return (u.mul_(head.factor) if head.factor != 1.0 else u), None
    t = u.mul_(head.logit_scale / head.softcap).tanh_()
    slope = (1 - t * t).mul_(head.factor)
    return t.mul_(head.softcap / head.temperature), slope


def padded(rows: int) -> int:
    """The next number of rows that gives each row the same bits in any batch."""
    return rows + -rows % _ROW_MULTIPLE


def cacheable_rows(rows: int, row_bytes: int, memory_budget: int) -> int:
    """How many of `rows` have their probabilities kept within the budget: all, or whole multiples, never a cut one."""
    affordable = memory_budget // row_bytes
    return min(padded(rows), affordable - affordable % _ROW_MULTIPLE)


def pad_rows(t: Tensor) -> Tensor:
    """Rows (N, ...) filled up with zeros to `padded(N)`."""
    missing = padded(t.shape[0]) - t.shape[0]
    return t if missing == 0 else torch.cat([t, t.new_zeros(missing, *t.shape[1:])])


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
    step = tile_shape(hidden.device)[0]
    blocks = []
    for start in range(0, max(n, 1), step):  # no rows are one empty block
        rows = slice(start, min(start + step, n))
        part = None
        if cache is not None and start < kept:
            part = Cache(cache.tiles[rows], cache.shifts[rows])
        blocks.append(_scan_rows(hidden[rows], weight, targets[rows], bias, head, grads, entropy, part))
    columns = list(zip(*blocks, strict=True))
    joined = [None if column[0] is None else torch.cat(column) for column in columns]
    return Forward(*joined[:4], stats=Stats(*joined[4:]), cache=cache)


def _scan_rows(h, weight, targets, bias, head, grads, entropy, cache):
    """Fold the whole vocabulary into the statistics of one block of rows (R, H); see the head of this file."""
    h = _operand(h)
    acc_dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    new = h.new_zeros(h.shape[0], dtype=acc_dtype)
    m, others, zothers, z_y, slope_y = new + _START, new.clone(), new.clone(), new.clone(), new + head.factor
    a = torch.zeros_like(h, dtype=acc_dtype) if grads else None  # (R, H)
    b = torch.zeros_like(a) if grads and entropy else None  # (R, H)

    for i, (v0, v1) in enumerate(vocabulary_tiles(weight.shape[0], h.device)):
        w = _operand(weight[v0:v1])  # (T, H)
        z, slope = _logits(h, w, None if bias is None else bias[v0:v1], head)  # (R, T)
        here = (targets >= v0) & (targets < v1)
        column = (targets - v0).clamp_(0, v1 - v0 - 1).unsqueeze(1)
        z_y = torch.where(here, z.gather(1, column).squeeze(1), z_y)
        if slope is not None:
            slope_y = torch.where(here, slope.gather(1, column).squeeze(1), slope_y)

        new_m = torch.maximum(m, z.amax(1))
        shrink, moved = (m - new_m).exp(), m - new_m
        m = new_m
        z -= m.unsqueeze(1)
        e = z.exp() if entropy else z.exp_()
        e.scatter_(1, column, e.gather(1, column).masked_fill(here.unsqueeze(1), 0.0))
        if entropy:
            z = z.clamp_(min=_START).mul_(e)  # the clamp turns 0 * -inf of masked entries into 0
            zothers = shrink * (zothers + moved * others) + z.sum(1)
        others = shrink * others + e.sum(1)
        if slope is not None:
            e *= slope
        if b is not None:
            b.addcmul_(a, moved.unsqueeze(1)).mul_(shrink.unsqueeze(1))
            _accumulate(b, z if slope is None else z.mul_(slope), w)
        if a is not None:
            a.mul_(shrink.unsqueeze(1))
            _accumulate(a, e, w)
        if cache is not None:
            rows = cache.tiles.shape[0]
            cache.tiles[:, v0:v1] = e[:rows]
            cache.shifts[:, i] = m[:rows]

    if head.softcap is None and a is not None:
        a *= head.factor
        b = None if b is None else b.mul_(head.factor)
    return _finish(weight, targets, Stats(m, others, (z_y - m).exp(), slope_y, zothers), z_y, a, b, entropy)


def _finish(weight, targets, stats, z_y, a, b, entropy):
    """From the folded sums of one block (zothers still in `stats.mean`) to its results."""
    shifted, total = z_y - stats.shift, stats.others + stats.target
    # log1p keeps the digits of a log-prob near 0; far below the maximum exp(m - z_y) would overflow.
    logprobs = torch.where(shifted > -30, -torch.log1p(stats.others * (-shifted).clamp_(max=30).exp()),
                           shifted - total.log())  # fmt: skip
    mean = torch.zeros_like(total)
    entropies = torch.zeros_like(total)
    if entropy:
        z_term = stats.target * shifted.clamp(min=_START)
        mean = (stats.mean + z_term) / total
        entropies = total.log() - mean
    grad_logprobs = grad_entropy = None
    if a is not None:
        w_y = weight[targets].to(a.dtype)  # (R, H)
        grad_logprobs = _row_scale(w_y, stats.others / total * stats.slope).sub_(_row_scale(a, 1 / total))
        if b is not None:
            # d entropy = -sum_j p_j (z_j - E[z]) slope_j W_j, the target's term added back
            target_term = stats.target * stats.slope * (shifted.clamp(min=_START) - mean) / total
            grad_entropy = _row_scale(a, mean / total) - _row_scale(b, 1 / total) - _row_scale(w_y, target_term)
    return logprobs, entropies, grad_logprobs, grad_entropy, *stats._replace(mean=mean)


def _row_scale(t: Tensor, scale: Tensor) -> Tensor:
    return t * scale.unsqueeze(1)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in hidden (N, H), weight (V, H) and bias (V,), as far as `needs` asks for each.

    2U FLOP where tiles were kept, 3U where the logits are recomputed. The weight's gradient is accumulated in
    float32 and leaves in the weight's dtype, one vocabulary tile after the other.
    """
    acc_dtype = stats.shift.dtype
    d_hidden = torch.zeros_like(hidden, dtype=acc_dtype) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    d_bias = torch.empty_like(bias) if needs[2] else None
    step = tile_shape(hidden.device)[0]
    kept = 0 if cache is None or grad_entropy is not None else cache.tiles.shape[0]
    for i, (v0, v1) in enumerate(vocabulary_tiles(weight.shape[0], hidden.device)):
        w = _operand(weight[v0:v1])  # (T, H)
        b = None if bias is None else bias[v0:v1]
        dw = torch.zeros_like(w, dtype=acc_dtype) if needs[1] else None
        db = torch.zeros(v1 - v0, dtype=acc_dtype, device=w.device)
        bounds = sorted({*range(0, hidden.shape[0], step), min(kept, hidden.shape[0]), hidden.shape[0]})
        for r0, r1 in pairwise(bounds):
            rows = slice(r0, r1)
            row_stats = Stats(*(s[rows] for s in stats))
            h = _operand(hidden[rows])
            if r1 <= kept:
                scale = -grad_logprobs[rows] / (row_stats.others + row_stats.target)
                scale = scale * (cache.shifts[rows, i] - row_stats.shift).exp()
                du = cache.tiles[rows, v0:v1] * scale.unsqueeze(1)
                du = du if head.softcap is not None else du.mul_(head.factor)
            else:
                g_entropy = None if grad_entropy is None else grad_entropy[rows]
                du = _recompute(h, w, b, head, row_stats, grad_logprobs[rows], g_entropy)
            _set_target(du, targets[rows] - v0, row_stats, grad_logprobs[rows],
                        None if grad_entropy is None else grad_entropy[rows])  # fmt: skip
            if d_hidden is not None:
                _accumulate(d_hidden[rows], du, w)
            if dw is not None:
                _accumulate(dw, du.t(), h)
            if needs[2]:
                db += du.sum(0)
        if dw is not None:
            d_weight[v0:v1] = dw
        if needs[2]:
            d_bias[v0:v1] = db
    return d_hidden, d_weight, d_bias


def _recompute(h, w, bias, head, stats, g_logprobs, g_entropy):
    """Gradient in `u` of one tile (R, T) from fresh logits; the target's entry is set by `_set_target`."""
    z, slope = _logits(h, w, bias, head)
    z -= stats.shift.unsqueeze(1)
    scale = 1 / (stats.others + stats.target)
    if g_entropy is None:
        du = z.exp_().mul_((-g_logprobs * scale).unsqueeze(1))
    else:
        # -p (g_logprobs + g_entropy (z - E[z])), with p of masked entries exactly 0
        p = z.exp().mul_(scale.unsqueeze(1))
        z = z.clamp_(min=_START).sub_(stats.mean.unsqueeze(1)).mul_(g_entropy.unsqueeze(1))
        du = z.add_(g_logprobs.unsqueeze(1)).mul_(p).neg_()
    return du.mul_(slope if slope is not None else head.factor)


def _set_target(du, column, stats, g_logprobs, g_entropy):
    """Write the target's gradient, `g (1 - p_y) slope_y` (+ entropy term), into the tile where it lies."""
    total = stats.others + stats.target
    value = g_logprobs * (stats.others / total)
    if g_entropy is not None:
        p_y = stats.target / total
        value = value - g_entropy * p_y * (stats.target.log().clamp(min=_START) - stats.mean)
    value = value * stats.slope
    here = (column >= 0) & (column < du.shape[1])
    column = column.clamp(0, du.shape[1] - 1).unsqueeze(1)
    du.scatter_(1, column, torch.where(here, value, du.gather(1, column).squeeze(1)).unsqueeze(1))
