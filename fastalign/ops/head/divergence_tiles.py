"""The tiled driver of `linear_divergence` in plain PyTorch: any device, any dtype.

Per row, with a and b the logits of student and teacher, s and t their softmax, m = beta t + (1 - beta) s:

    forward_kl  sum_j t log(t / s) + s - t                              c = s - t
    reverse_kl  sum_j s log(s / t) + t - s                              c = s (log(s / t) - K)   K = sum s log(s / t)
    jsd         sum_j beta t log(t / m) + (1 - beta) s log(s / m)       c = (1 - beta) s (log(s / m) - K)
                                                                                                 K = sum s log(s / m)

where c is the gradient in a, so that the gradient in hidden is `sum_j c_j slope_j W_j`. s - t sums to 0; with it every
term of a sum is at least 0, nothing cancels, and the normalisers' rounding errors only count squared. For a divergence
near 0 to keep its digits, the terms must not come from differences of rounded exponentials either: with
d = log(t / s) / 2, t - s is (s + t) tanh d, and t log(t / s) + s - t is (s + t) (d (1 + tanh d) - tanh d); and
log(t / m) is log1p((1 - beta) (t - s) / m). Where both sides have the same logits, divergence and gradient are 0.

How many products: every c needs both normalisers, and K the divergence itself, which are known after the whole
vocabulary only. Folding running exponentials, as `tiles.py` does, would have to keep E_s[W] and E_t[W] (and E_s[x W])
apart: two folds, and none at all for jsd, whose log m needs the normalisers first. Forming the logits twice costs two
products more. Instead the logits of both sides are held for as many rows at a time as fit a constant number of bytes:

    student logits + teacher logits                         once, held; the normalisers on the way
    the sums above                                          elementwise over what is held
    fold c W into (rows, H)                                 the third product

So with U = 2 N V H of the student, T of the teacher: U + T without gradients, 2U + T with a frozen student head, for
all three divergences. A trainable head takes another 2U + T in `backward`, which forms c again; 3U + T in all where the
rows' coefficients are known in `forward`. Extra memory is the budget and a tile, whatever V is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head.logprobs_tiles import Head
from fastalign.ops.head.products import accumulate, in_place, operand, product

# Far below any logit, yet finite: the difference of two entries that both sides rule out is 0 and not NaN.
START = -1e30
# A divergence this large comes from entries that one side rules out (-inf), which are held as START.
RULED_OUT = 1e9
_ROW_MULTIPLE = 16  # as in tiles.py


class Side(NamedTuple):
    """Student or teacher: `z = softcap * tanh(logit_scale * (h W' + b) / softcap) / temperature`."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    head: Head

    def block(self, rows: slice) -> Side:
        return self._replace(hidden=operand(self.hidden[rows]))


class Divergence(NamedTuple):
    name: str  # one of reference.DIVERGENCES
    beta: float  # of the jsd


class Epilogue(NamedTuple):
    """What a GPU backend does to tiles between products: kernels/linear_divergence.py says of each what it is."""

    normalise: Callable[..., None]  # (z, bias, head, top, total)
    terms: Callable[..., None]  # (a, b, stats, kind, beta, head, values, moments)
    gradient: Callable[..., None]  # (a, b, moments, scale, coefficients, out)


class Forward(NamedTuple):
    values: Tensor  # (N,)
    grad_hidden: Tensor | None  # (N, H) d value / d hidden
    stats: Tensor  # (N, 5): maximum and log-sum of the student, then of the teacher, and K; enough to form c again
    d_weight: Tensor | None  # (V, H) of sum(coefficients * values)
    d_bias: Tensor | None  # (V,)


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows of a block at most, and vocabulary entries of one tile."""
    return (512, 2048) if device.type == "cpu" else (4096, 8192)


def default_budget(device: torch.device) -> int:
    """Bytes of held logits when the caller names no budget."""
    return (128 if device.type == "cpu" else 1024) << 20


def block_rows(rows: int, vocab: int, element: int, budget: int, device: torch.device) -> int:
    """Rows whose logits, of both sides, fit the budget: a multiple of 16, 16 at least, and alike in all blocks."""
    fit = min(budget // (2 * vocab * element), tile_shape(device)[0])
    fit = max(fit - fit % _ROW_MULTIPLE, _ROW_MULTIPLE)
    even = -(-rows // max(-(-rows // fit), 1))
    return max(even + -even % _ROW_MULTIPLE, _ROW_MULTIPLE)


def vocabulary_tiles(vocab: int, device: torch.device) -> list[tuple[int, int]]:
    step = tile_shape(device)[1]
    return [(start, min(start + step, vocab)) for start in range(0, vocab, step)]


# What one tile of log s and log t (R, T) adds to the value and to K. Both end up as what `gradient` needs: s - t, or
# s and s times the log-ratio. x, y: scratch.


def _forward_kl(a: Tensor, b: Tensor, x: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor | None]:
    _half_ratio(a, b, x, y)  # s + t, log(t / s) / 2 =: d
    torch.tanh(b, out=y)
    torch.addcmul(b, b, y, out=x).sub_(y)  # d (1 + tanh d) - tanh d
    value = x.mul_(a).sum(1)
    a.mul_(y.neg_())  # s - t
    return value, None


def _reverse_kl(a: Tensor, b: Tensor, x: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor | None]:
    _half_ratio(a, b, x, y)
    torch.tanh(b, out=y)
    torch.addcmul(b, b, y, value=-1, out=x).sub_(y)  # d (1 - tanh d) - tanh d
    value = x.mul_(a).sum(1).neg_()
    a.addcmul_(a, y, value=-1).mul_(0.5)  # s
    b.mul_(a).mul_(-2)  # s log(s / t)
    return value, b.sum(1)


def _half_ratio(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> None:
    """From log s, log t: s + t into a, log(t / s) / 2 into b."""
    torch.exp(b, out=x)
    b.sub_(a).mul_(0.5)
    a.exp_().add_(x)


def _jsd(a: Tensor, b: Tensor, x: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor | None]:
    limits = torch.finfo(a.dtype)
    a.exp_(), b.exp_()  # s, t
    torch.sub(b, a, out=x)
    torch.add(a, x, alpha=beta, out=y).clamp_(min=limits.tiny)  # m
    x.div_(y)  # (t - s) / m
    torch.mul(x, 1 - beta, out=y).clamp_(min=limits.eps - 1).log1p_().mul_(b)  # t log(t / m)
    torch.mul(x, -beta, out=b).clamp_(min=limits.eps - 1).log1p_().mul_(a)  # s log(s / m)
    return y.mul_(beta).add_(b, alpha=1 - beta).sum(1), b.sum(1)


_TERMS: dict[str, Callable] = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


def gradient(a: Tensor, b: Tensor, moment: Tensor, kind: Divergence, head: Head) -> Tensor:
    """C slope of one tile, from what its terms left in a and b."""
    c = a if kind.name == "forward_kl" else b.addcmul_(a, moment.unsqueeze(1), value=-1)
    scale = gradient_scale(kind, head)
    return c.mul_(scale) if scale != 1.0 else c


def gradient_scale(kind: Divergence, head: Head) -> float:
    return (1 - kind.beta if kind.name == "jsd" else 1.0) * (head.factor if head.softcap is None else 1.0)


def terms(a, b, stats, kind: Divergence, head: Head, scratch) -> tuple[Tensor, Tensor | None]:
    """From one tile of logits to its value and its part of K; with a soft cap, a and b take in its slope."""
    slope = None
    if head.softcap is not None:
        slope = slope_of(a, head)
    # Not the logsumexp at once: it is rounded to its size, the two parts to theirs.
    a.sub_(stats[:, 0:1]).sub_(stats[:, 1:2])
    b.sub_(stats[:, 2:3]).sub_(stats[:, 3:4])
    out = _TERMS[kind.name](a, b, *scratch, kind.beta)
    if slope is not None:
        a.mul_(slope)
        b.mul_(slope)
    return out


def slope_of(z: Tensor, head: Head) -> Tensor:
    """Dz / d(h W' + b) of a soft cap; an entry that is ruled out has slope 0."""
    t = z.mul(head.temperature / head.softcap).clamp_(min=-1)
    return t.square_().neg_().add_(1).mul_(head.factor)


def project(side: Side, v0: int, v1: int, out: Tensor) -> Tensor:
    """Logits of one tile, into `out` (R, T); entries that the bias rules out are finite."""
    multiply(side, v0, v1, out)
    if side.bias is not None:
        out.add_(side.bias[v0:v1]).clamp_(min=START)
    head = side.head
    if head.softcap is not None:
        return out.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap / head.temperature)
    return out.mul_(head.factor) if head.factor != 1.0 else out


def multiply(side: Side, v0: int, v1: int, out: Tensor) -> Tensor:
    w = operand(side.weight[v0:v1])  # (T, H)
    if w.dtype == out.dtype:
        return torch.mm(side.hidden, w.t(), out=out)
    if out.dtype == torch.float32:
        return torch.mm(side.hidden, w.t(), out_dtype=out.dtype, out=out)
    return out.copy_(product(side.hidden, w.t()))


class LogSumExp:
    """A running logsumexp per row."""

    def __init__(self, rows: int, like: Tensor):
        self.top = like.new_full((rows,), START)
        self.total = like.new_zeros(rows)

    def absorb(self, z: Tensor, scratch: Tensor) -> None:
        top = torch.maximum(self.top, z.amax(1))
        here = torch.sub(z, top.unsqueeze(1), out=scratch).exp_().sum(1)
        self.total = self.total * (self.top - top).exp() + here
        self.top = top


class _Held:
    """Room for the logits of one block of rows, and for scratch; a tile (R, T) is contiguous."""

    def __init__(self, rows: int, vocab: int, tile: int, like: Tensor):
        self.student, self.teacher = like.new_empty(rows * vocab), like.new_empty(rows * vocab)
        self.spare = like.new_empty(2, rows * min(tile, vocab))

    def tile(self, rows: int, v0: int, v1: int) -> tuple[Tensor, Tensor]:
        return tuple(t[rows * v0 : rows * v1].view(rows, v1 - v0) for t in (self.student, self.teacher))

    def scratch(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        return tuple(t[: rows * width].view(rows, width) for t in self.spare)


def forward(
    student: Side,
    teacher: Side,
    kind: Divergence,
    *,
    grads: bool,
    coefficients: Tensor | None = None,
    needs: tuple[bool, bool] = (False, False),
    budget: int,
    epilogue: Epilogue | None = None,
) -> Forward:
    """Divergences, with `grads` their gradients in the student's hidden states, and with `coefficients` (N,) those of
    `sum(coefficients * values)` in its weight and bias, as far as `needs` asks for each.

    N must be a multiple of 16 (`pad_rows`); both sides have the same V.
    """
    (n, width), vocab = student.hidden.shape, student.weight.shape[0]
    like = student.hidden.new_empty(0, dtype=_accumulator(student, teacher))
    rows = block_rows(n, vocab, like.element_size(), budget, like.device)
    held = _Held(min(rows, n), vocab, tile_shape(like.device)[1], like)
    values, stats = like.new_empty(n), like.new_zeros(n, 5)
    grad_hidden = like.new_zeros(n, width) if grads else None
    d_weight = like.new_zeros(vocab, width) if needs[0] else None
    d_bias = like.new_zeros(vocab) if needs[1] else None
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        sides = student.block(block), teacher.block(block)
        values[block] = _measure(*sides, kind, held, stats[block], epilogue)
        for v0, v1 in vocabulary_tiles(vocab, like.device) if grads or any(needs) else ():
            a, b = held.tile(sides[0].hidden.shape[0], v0, v1)
            if epilogue is None:
                c = gradient(a, b, stats[block, 4], kind, student.head)
            else:
                c = _form(epilogue, (a, b), stats[block], kind, student, None)
            if grads:
                accumulate(grad_hidden[block], c, operand(student.weight[v0:v1]))
            if any(needs):
                spread(c.mul_(coefficients[block].unsqueeze(1)), sides[0].hidden, d_weight, d_bias, slice(v0, v1))
    return Forward(values, grad_hidden, stats, d_weight, d_bias)


def _accumulator(student: Side, teacher: Side) -> torch.dtype:
    wide = torch.float64 in (student.hidden.dtype, teacher.hidden.dtype)
    return torch.float64 if wide else torch.float32


def _measure(
    student: Side, teacher: Side, kind: Divergence, held: _Held, stats: Tensor, epilogue: Epilogue | None
) -> Tensor:
    """Values (R,) of one block of rows; fills in stats (R, 5), and leaves in `held` what `gradient` needs."""
    rows, vocab = student.hidden.shape[0], student.weight.shape[0]
    sums = LogSumExp(rows, stats), LogSumExp(rows, stats)
    tiles = vocabulary_tiles(vocab, stats.device)
    for v0, v1 in tiles:
        for side, z, total in zip((student, teacher), held.tile(rows, v0, v1), sums, strict=True):
            if epilogue is None:
                total.absorb(project(side, v0, v1, z), held.scratch(rows, v1 - v0)[0])
            else:
                bias = None if side.bias is None else side.bias[v0:v1]
                epilogue.normalise(multiply(side, v0, v1, z), bias, side.head, total.top, total.total)
    for i, total in enumerate(sums):
        stats[:, 2 * i], stats[:, 2 * i + 1] = total.top, total.total.log()
    values, moments = stats.new_zeros(rows), stats.new_zeros(rows)
    for v0, v1 in tiles:
        if epilogue is not None:
            epilogue.terms(*held.tile(rows, v0, v1), stats, *kind, student.head, values, moments)
            continue
        value, moment = terms(*held.tile(rows, v0, v1), stats, kind, student.head, held.scratch(rows, v1 - v0))
        values += value
        if moment is not None:
            moments += moment
    stats[:, 4] = moments
    return values.masked_fill_(values > RULED_OUT, float("inf"))


def spread(c: Tensor, hidden: Tensor, d_weight: Tensor | None, d_bias: Tensor | None, entries: slice) -> None:
    """Add the gradient c (R, T) of one tile to the weight's and the bias's."""
    if d_weight is not None:
        accumulate(d_weight[entries], c.t(), hidden)
    if d_bias is not None:
        d_bias[entries] += c.sum(0)


def backward(
    coefficients: Tensor,
    student: Side,
    teacher: Side,
    kind: Divergence,
    stats: Tensor,
    *,
    needs: tuple[bool, bool],
    epilogue: Epilogue | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `sum(coefficients * values)` in the student's weight (V, H) and bias (V,), from fresh logits.

    2U + T FLOP. Accumulated in float32, one vocabulary tile after the other; returned in the dtype of weight and bias.
    """
    n, vocab = student.hidden.shape[0], student.weight.shape[0]
    step, width = tile_shape(stats.device)
    held = _Held(min(step, n), min(width, vocab), width, stats)
    d_weight = torch.empty_like(student.weight) if needs[0] else None
    d_bias = torch.empty_like(student.bias) if needs[1] else None
    for v0, v1 in vocabulary_tiles(vocab, stats.device):
        dw = stats.new_zeros(v1 - v0, student.weight.shape[1]) if needs[0] else None
        db = stats.new_zeros(v1 - v0) if needs[1] else None
        for start in range(0, n, step):
            block = slice(start, min(start + step, n))
            sides, rows = (student.block(block), teacher.block(block)), min(step, n - start)
            a, b = held.tile(rows, 0, v1 - v0)
            if epilogue is None:
                project(sides[0], v0, v1, a), project(sides[1], v0, v1, b)
                terms(a, b, stats[block], kind, student.head, held.scratch(rows, v1 - v0))
                c = gradient(a, b, stats[block, 4], kind, student.head).mul_(coefficients[block].unsqueeze(1))
            else:
                _measure_again(epilogue, sides, (v0, v1), (a, b), stats[block], kind)
                c = _form(epilogue, (a, b), stats[block], kind, student, coefficients[block].contiguous())
            spread(c, sides[0].hidden, dw, db, slice(None))
        if needs[0]:
            d_weight[v0:v1] = dw
        if needs[1]:
            d_bias[v0:v1] = db
    return d_weight, d_bias


def _form(epilogue: Epilogue, tile, stats, kind: Divergence, student: Side, coefficients) -> Tensor:
    """C slope of one tile by a GPU's epilogue, in the dtype of the product that follows."""
    a, b = tile
    c = in_place(a, student.hidden.dtype)
    second = None if kind.name == "forward_kl" else b
    epilogue.gradient(a, second, stats[:, 4].contiguous(), gradient_scale(kind, student.head), coefficients, c)
    return c


def _measure_again(epilogue: Epilogue, sides, entries, tile, stats, kind: Divergence) -> None:
    """What `_measure` leaves of one tile, from fresh products; what it adds up on the way is known already."""
    unused = torch.empty(2, stats.shape[0], device=stats.device)
    for side, z in zip(sides, tile, strict=True):
        bias = None if side.bias is None else side.bias[slice(*entries)]
        epilogue.normalise(multiply(side, *entries, z), bias, side.head, *unused)
    epilogue.terms(*tile, stats, *kind, sides[0].head, *unused)
