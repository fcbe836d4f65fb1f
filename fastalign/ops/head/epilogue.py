"""What happens to one tile of logits between its two matrix products: the interface, in plain PyTorch.

`tiles.py` drives; an epilogue is the part that only moves memory. Triton (kernels/linear_logprobs.py) and CUDA
(native_cuda.py) have the same functions with the same arguments, and write only into the tensors they are
handed. The mathematics is told at the head of `tiles.py`.

A tile `u` (R, T) holds products `h W'` of R tokens and T vocabulary entries, the first of which is entry `first` of
the vocabulary; rows may lie any distance apart, columns are next to each other. targets (R,) int64 count from the
start of the vocabulary; one that lies outside of the tile touches nothing. bias (T,) or None. What is per row or per
column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Far below any logit, yet finite, so that (start - shift) * 0 is 0 and not NaN on the first tile.
START = -1e30


class Head(NamedTuple):
    """What turns `u = h W' + b` into logits: `z = softcap * tanh(logit_scale * u / softcap) / temperature`."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        return self.logit_scale / self.temperature

    def slope(self, z: Tensor) -> Tensor:
        """dz/du where the logit is z: below the factor only where a cap makes it so."""
        if self.softcap is None:
            return torch.full_like(z, self.factor)
        t = (z * (self.temperature / self.softcap)).clamp_(-1, 1)
        return (1 - t * t).mul_(self.factor)


class Sums(NamedTuple):
    """Running sums of R tokens, each (R,), updated in place; targets are left out of `others` and `zothers`.

    They start at START, 0, 0 and 0. Triton and CUDA keep float32. The shift is the running maximum, or up to 8
    below it: a kernel may let it lag, so that accumulated sums are hardly ever rescaled.
    """

    shift: Tensor  # the reference m that exponentials are taken against
    others: Tensor  # sum exp(z - m)
    zothers: Tensor  # sum exp(z - m) (z - m), 0 unless the entropy is asked for
    target: Tensor  # the target's logit


class Stats(NamedTuple):
    """Per row, after the whole vocabulary: enough to rebuild any probability from its logit. Shapes (N,)."""

    shift: Tensor  # m, the maximum or a little below it
    others: Tensor  # sum over the vocabulary without the target of exp(z - m)
    target: Tensor  # exp(z_y - m)
    slope: Tensor  # dz/du at the target
    mean: Tensor  # E[z - m], 0 unless the entropy was asked for


class Coefficients(NamedTuple):
    """What the gradient in u is made of, per token (R,): see `softmax_gradient`."""

    shift: Tensor  # of the forward pass
    mean: Tensor  # E[z - shift]
    logprobs: Tensor  # -grad_logprobs / total
    entropy: Tensor | None  # -grad_entropy / total
    target: Tensor  # the gradient at the target itself

    def rows(self, rows: slice) -> Coefficients:
        return Coefficients(*(None if t is None else t[rows] for t in self))


class Epilogue(NamedTuple):
    """The four functions of one backend."""

    absorb: Callable[..., None]
    finish: Callable[..., tuple[Tensor, Tensor, Stats]]
    softmax_gradient: Callable[..., None]
    kept_gradient: Callable[..., None]
    # Whether tiles are handed over in the inputs' dtype, as the second product takes them, or in that of the sums.
    low_precision: bool


def absorb(
    u: Tensor,
    targets: Tensor,
    first: int,
    bias: Tensor | None,
    head: Head,
    sums: Sums,
    *,
    entropy: bool = False,
    e: Tensor | None = None,
    ze: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    best: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fold a tile into the sums: `z = head(u + bias)`, the shift follows, and `sums` take in `exp(z - shift)`.

    e (R, T), if given, receives `exp(z - shift) dz/du` (without a cap: `exp(z - shift)`, the constant factor is the
        driver's), 0 at the target, in e's dtype. It may be u's own memory: row by row, u is read before e is written.
    ze (R, T), if given, receives `(z - shift)` times that, likewise; e and ze do not overlap.
    a (R, H), b (R, H), if given, are the sums of products so far, and follow the shift: with `down = exp(old - new)`,
        `b = down (b + (old - new) a)` and `a = down a`. Rows whose shift stays are not touched, nor those at START.
    best: running (largest logit (R,), its vocabulary entry (R,) int64) over all entries, the first where several tie.
    u is overwritten.
    """
    z, slope = _logits(u, bias, head)
    here = (targets >= first) & (targets < first + u.shape[1])
    column = (targets - first).clamp_(0, u.shape[1] - 1).unsqueeze(1)
    sums.target.copy_(torch.where(here, z.gather(1, column).squeeze(1), sums.target))
    top = z.max(1) if best is not None else z.amax(1)
    if best is not None:
        better = top.values > best[0]
        best[0].copy_(torch.where(better, top.values, best[0]))
        best[1].copy_(torch.where(better, top.indices + first, best[1]))
        top = top.values
    shift = torch.maximum(sums.shift, top)
    moved = sums.shift - shift
    shrink = moved.exp()
    sums.shift.copy_(shift)
    z -= shift.unsqueeze(1)
    apart = e is not None and e.dtype == z.dtype and e.data_ptr() != z.data_ptr()
    exps = torch.exp(z, out=e if apart else None) if entropy else z.exp_()
    exps.scatter_(1, column, exps.gather(1, column).masked_fill(here.unsqueeze(1), 0.0))
    if entropy:
        z = z.clamp_(min=START).mul_(exps)  # the clamp turns 0 * -inf of masked entries into 0
        sums.zothers.copy_(shrink * (sums.zothers + moved * sums.others) + z.sum(1))
    sums.others.copy_(shrink * sums.others + exps.sum(1))
    if e is not None:
        _deliver(exps, slope, e)
    if ze is not None:
        _deliver(z, slope, ze)
    if b is not None:
        b.addcmul_(a, moved.unsqueeze(1)).mul_(shrink.unsqueeze(1))
    if a is not None:
        a.mul_(shrink.unsqueeze(1))


def _deliver(value: Tensor, slope: Tensor | None, out: Tensor) -> None:
    if slope is not None:
        value *= slope
    if out.data_ptr() != value.data_ptr():
        out.copy_(value)


def finish(
    weight: Tensor,
    targets: Tensor,
    head: Head,
    sums: Sums,
    *,
    entropy: bool = False,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """(logprobs (R,), entropy (R,) or zeros, stats) from the sums over the whole vocabulary; weight (V, H).

    a (R, H) and b (R, H), if given, become the gradients of log-probs and entropy in the hidden states, in place.
    """
    shifted, at_target = sums.target - sums.shift, (sums.target - sums.shift).exp()
    total = sums.others + at_target
    # log1p keeps the digits of a log-prob near 0; far below the maximum exp(m - z_y) would overflow.
    logprobs = torch.where(shifted > -30, -torch.log1p(sums.others * (-shifted).clamp_(max=30).exp()),
                           shifted - total.log())  # fmt: skip
    mean, entropies = torch.zeros_like(total), torch.zeros_like(total)
    if entropy:
        mean = (sums.zothers + at_target * shifted.clamp(min=START)) / total
        entropies = total.log() - mean
    slope = head.slope(sums.target)
    if a is not None:
        w_y, factor = weight[targets].to(a.dtype), head.factor if head.softcap is None else 1.0  # (R, H)
        if b is not None:
            # d entropy = -sum_j p_j (z_j - E[z]) slope_j W_j, the target's term added back
            target_term = at_target * slope * (shifted.clamp(min=START) - mean) / total
            b.mul_(_column(-factor / total)).add_(a * _column(factor * mean / total))
            b.sub_(w_y * _column(target_term))
        a.mul_(_column(-factor / total)).add_(w_y.mul_(_column(sums.others / total * slope)))
    return logprobs, entropies, Stats(sums.shift, sums.others, at_target, slope, mean)


def pick_rows(weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, where among them each target's lies): those of weight (V, H) itself where they have no gaps."""
    if weight.stride(1) == 1 or weight.shape[1] <= 1:
        return weight, targets
    return weight[targets], torch.arange(targets.shape[0], device=targets.device)


def _column(t: Tensor) -> Tensor:
    return t.unsqueeze(1)


def softmax_gradient(
    u: Tensor, targets: Tensor, first: int, bias: Tensor | None, head: Head, c: Coefficients, du: Tensor
) -> None:
    """The gradient in u of a tile, from its products: `(c.logprobs + c.entropy (d - c.mean)) exp(d) dz/du` with
    `d = z - c.shift`, and c.target at the target; into du (R, T), which may be u's own memory. u is overwritten.
    """
    z, slope = _logits(u, bias, head)
    z -= c.shift.unsqueeze(1)
    if c.entropy is None:
        g = z.exp_().mul_(c.logprobs.unsqueeze(1))
    else:
        p = z.exp()  # exactly 0 for masked entries, whatever it is multiplied with below
        g = z.clamp_(min=START).sub_(c.mean.unsqueeze(1)).mul_(c.entropy.unsqueeze(1))
        g = g.add_(c.logprobs.unsqueeze(1)).mul_(p)
    g.mul_(slope if slope is not None else head.factor)
    _set_target(g, targets - first, c.target)
    if du.data_ptr() != g.data_ptr():
        du.copy_(g)


def kept_gradient(kept: Tensor, targets: Tensor, first: int, scale: Tensor, target: Tensor, du: Tensor) -> None:
    """The same from a tile `e` that `absorb` left: `scale * kept`, and `target` at the target, into du (R, T).

    kept (R, T), any distance between rows, is not written; scale and target (R,).
    """
    torch.mul(kept, scale.unsqueeze(1), out=du)
    _set_target(du, targets - first, target)


def _set_target(du: Tensor, column: Tensor, value: Tensor) -> None:
    here = (column >= 0) & (column < du.shape[1])
    column = column.clamp(0, du.shape[1] - 1).unsqueeze(1)
    value = torch.where(here, value.to(du.dtype), du.gather(1, column).squeeze(1))
    du.scatter_(1, column, value.unsqueeze(1))


def _logits(u: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """Logits in place of u (R, T), and their slope dz/du where that varies (soft cap), else None."""
    if bias is not None:
        u += bias
    if head.softcap is None:
        return (u.mul_(head.factor) if head.factor != 1.0 else u), None
    t = u.mul_(head.logit_scale / head.softcap).tanh_()
    slope = (1 - t * t).mul_(head.factor)
    return t.mul_(head.softcap / head.temperature), slope


TORCH = Epilogue(absorb, finish, softmax_gradient, kept_gradient, low_precision=False)
