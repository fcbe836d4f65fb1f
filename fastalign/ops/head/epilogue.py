"""What happens to one tile of logits between its two matrix products, in plain PyTorch.

`logprobs_tiles.py` drives: it runs the products, and explains the mathematics at its head. An epilogue is the part in
between that only moves memory. Triton (kernels/linear_logprobs.py) and CUDA (backends/cuda.py) have the same functions
with the same arguments, and write only into the tensors they are handed.

A tile `u` (R, T) holds the products `h W'` of R tokens and T vocabulary entries, the first of which is entry `first` of
the vocabulary. Rows may lie any distance apart; columns are next to each other. Targets (R,) int64 count from the start
of the vocabulary, so a target that lies outside of the tile touches nothing. bias is (T,) or None. Whatever is per row
or per column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head.tiling import START
from fastalign.ops.head.transform import LogitTransform


class Sums(NamedTuple):
    """Running sums of R tokens, each (R,), updated in place.

    They start at START, 0, 0 and 0. The target is left out of `others` and `zothers`. Triton and CUDA keep them in
    float32. The shift is the running maximum or up to 8 below it. A kernel may let it lag behind like that (*lazy
    rescaling*), because e^8 costs no digits and the accumulated products are then hardly ever rescaled.
    """

    shift: Tensor  # m, what exponentials are taken relative to
    others: Tensor  # sum exp(z - m)
    zothers: Tensor  # sum exp(z - m) (z - m); 0 unless the entropy is wanted
    target: Tensor  # the target's logit


class Stats(NamedTuple):
    """Per row, after the whole vocabulary: enough to compute any probability from its logit. Each (N,)."""

    shift: Tensor  # m, the maximum or a little below it
    others: Tensor  # sum over the vocabulary without the target of exp(z - m)
    target: Tensor  # exp(z_y - m)
    slope: Tensor  # dz/du at the target
    mean: Tensor  # E[z - m]; 0 unless the entropy was wanted


class Coefficients(NamedTuple):
    """The numbers per token, each (R,), that `softmax_gradient` makes the gradient in u from."""

    shift: Tensor  # of the forward pass
    mean: Tensor  # E[z - shift]
    # total = others + target of `Stats`, the sum of exp(z - shift) over the whole vocabulary
    logprob_factor: Tensor  # -grad_logprobs / total
    entropy_factor: Tensor | None  # -grad_entropy / total; None if the entropy has no gradient
    target: Tensor  # the gradient at the target itself

    def rows(self, rows: slice) -> Coefficients:
        """Those of some rows."""
        shift, mean, logprob_factor, entropy_factor, target = self
        return Coefficients(
            shift[rows], mean[rows], logprob_factor[rows], None if entropy_factor is None else entropy_factor[rows],
            target[rows],
        )  # fmt: skip


class Epilogue(NamedTuple):
    """The four functions of one backend."""

    absorb: Callable[..., None]
    finish: Callable[..., tuple[Tensor, Tensor, Stats]]
    softmax_gradient: Callable[..., None]
    kept_gradient: Callable[..., None]
    # Whether it writes tiles in the inputs' dtype, as the second product takes them, or in the dtype of the sums.
    low_precision: bool


def absorb(
    u: Tensor,
    targets: Tensor,
    first: int,
    bias: Tensor | None,
    transform: LogitTransform,
    sums: Sums,
    *,
    entropy: bool = False,
    e: Tensor | None = None,
    ze: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    best: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fold a tile into the running sums of its rows (*online softmax*). u is overwritten.

    The logits are `z = transform(u + bias)`. The shift m follows their maximum: sums that were taken relative to the
    old shift are multiplied by `exp(old - new)` before `exp(z - m)` of this tile is added.

    Args:
        u: (R, T) products.
        targets: (R,).
        first: The vocabulary entry of the tile's first column.
        bias: (T,) or None.
        transform: From products to logits.
        sums: Updated in place.
        entropy: Whether `sums.zothers` is wanted.
        e: (R, T) or None. It receives `exp(z - m) dz/du`, 0 at the target, in e's dtype. Without a soft cap it receives
            `exp(z - m)`, since the driver applies the constant factor. It may lie in u's own memory: row by row, u is
            read before e is written.
        ze: (R, T) or None. It receives `(z - m)` times what e receives. e and ze do not overlap.
        a: (R, H) or None. The sums of products with e so far, which follow the shift: `a = exp(old - new) a`. Rows
            whose shift stays are not touched, nor rows whose shift is still START.
        b: (R, H) or None. The same with ze: `b = exp(old - new) (b + (old - new) a)`.
        best: Running (largest logit (R,), its vocabulary entry (R,) int64) over all entries, or None. Of several equal
            logits the first one counts.
    """
    z, slope = _logits(u, bias, transform)
    here = (targets >= first) & (targets < first + u.shape[1])
    column = (targets - first).clamp_(0, u.shape[1] - 1).unsqueeze(1)
    sums.target.copy_(torch.where(here, z.gather(1, column).squeeze(1), sums.target))
    if best is None:
        top = z.amax(1)
    else:
        top, indices = z.max(1)
        better = top > best[0]
        best[0].copy_(torch.where(better, top, best[0]))
        best[1].copy_(torch.where(better, indices + first, best[1]))
    shift = torch.maximum(sums.shift, top)
    shift_change = sums.shift - shift
    shrink = shift_change.exp()
    sums.shift.copy_(shift)
    z -= shift.unsqueeze(1)
    # For the entropy z is needed once more after the exponential, so that goes elsewhere: into e, where that fits.
    fits = e is not None and e.dtype == z.dtype and e.data_ptr() != z.data_ptr()
    exps = torch.exp(z, out=e if fits else None) if entropy else z.exp_()
    exps.scatter_(1, column, exps.gather(1, column).masked_fill(here.unsqueeze(1), 0.0))
    if entropy:
        z = z.clamp_(min=START).mul_(exps)  # the clamp turns 0 * -inf of masked entries into 0
        sums.zothers.copy_(shrink * (sums.zothers + shift_change * sums.others) + z.sum(1))
    sums.others.copy_(shrink * sums.others + exps.sum(1))
    if e is not None:
        _deliver(exps, slope, e)
    if ze is not None:
        _deliver(z, slope, ze)
    if b is not None and a is not None:
        b.addcmul_(a, shift_change.unsqueeze(1)).mul_(shrink.unsqueeze(1))
    if a is not None:
        a.mul_(shrink.unsqueeze(1))


def _deliver(value: Tensor, slope: Tensor | None, out: Tensor) -> None:
    """`out = value * slope`; value is overwritten."""
    if slope is not None:
        value *= slope
    if out.data_ptr() != value.data_ptr():
        out.copy_(value)


def finish(
    weight: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    sums: Sums,
    *,
    entropy: bool = False,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """The results of R rows, from their sums over the whole vocabulary.

    Args:
        weight: (V, H).
        targets: (R,).
        transform: From products to logits.
        sums: What `absorb` left.
        entropy: Whether the entropy is wanted.
        a: (R, H) or None. The sums of products become d logprob / d hidden, in place.
        b: (R, H) or None. They become d entropy / d hidden, in place.

    Returns:
        logprobs (R,), entropies (R,) (zeros unless wanted) and stats.
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
    slope = transform.slope(sums.target)
    if a is not None:
        w_y = weight[targets].to(a.dtype)  # (R, H)
        factor = transform.factor if transform.softcap is None else 1.0
        if b is not None:
            # d entropy / d hidden = -sum_j p_j (z_j - E[z]) slope_j W_j. The sums lack the target's term: add it back.
            target_term = at_target * slope * (shifted.clamp(min=START) - mean) / total
            b.mul_(_column(-factor / total)).add_(a * _column(factor * mean / total))
            b.sub_(w_y * _column(target_term))
        a.mul_(_column(-factor / total)).add_(w_y.mul_(_column(sums.others / total * slope)))
    return logprobs, entropies, Stats(sums.shift, sums.others, at_target, slope, mean)


def pick_rows(weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(matrix, row numbers (R,)) in which a kernel finds each target's weight row without gaps inside the row.

    That is weight (V, H) itself where its rows have no gaps, else a copy of the targets' rows.
    """
    if weight.stride(1) == 1 or weight.shape[1] <= 1:
        return weight, targets
    return weight[targets], torch.arange(targets.shape[0], device=targets.device)


def _column(t: Tensor) -> Tensor:
    return t.unsqueeze(1)


def softmax_gradient(
    u: Tensor,
    targets: Tensor,
    first: int,
    bias: Tensor | None,
    transform: LogitTransform,
    c: Coefficients,
    du: Tensor,
) -> None:
    """The gradient in u of a tile, from its products, into du (R, T). u is overwritten, and du may lie in its memory.

    It is `(c.logprob_factor + c.entropy_factor (d - c.mean)) exp(d) dz/du` with `d = z - c.shift`, but c.target at the
    target.
    """
    z, slope = _logits(u, bias, transform)
    z -= c.shift.unsqueeze(1)
    if c.entropy_factor is None:
        g = z.exp_().mul_(c.logprob_factor.unsqueeze(1))
    else:
        p = z.exp()  # exactly 0 for masked entries, whatever it is multiplied with below
        g = z.clamp_(min=START).sub_(c.mean.unsqueeze(1)).mul_(c.entropy_factor.unsqueeze(1))
        g = g.add_(c.logprob_factor.unsqueeze(1)).mul_(p)
    g.mul_(slope if slope is not None else transform.factor)
    _set_target(g, targets - first, c.target)
    if du.data_ptr() != g.data_ptr():
        du.copy_(g)


def kept_gradient(kept: Tensor, targets: Tensor, first: int, scale: Tensor, target: Tensor, du: Tensor) -> None:
    """The same from a cached tile `e` that `absorb` left: `scale * kept`, but `target` at the target, into du (R, T).

    kept (R, T) may have any distance between its rows, and is not written. scale and target are (R,).
    """
    torch.mul(kept, scale.unsqueeze(1), out=du)
    _set_target(du, targets - first, target)


def _set_target(du: Tensor, column: Tensor, value: Tensor) -> None:
    """`du[row, column[row]] = value[row]` where that column lies inside the tile."""
    here = (column >= 0) & (column < du.shape[1])
    column = column.clamp(0, du.shape[1] - 1).unsqueeze(1)
    value = torch.where(here, value.to(du.dtype), du.gather(1, column).squeeze(1))
    du.scatter_(1, column, value.unsqueeze(1))


def _logits(u: Tensor, bias: Tensor | None, transform: LogitTransform) -> tuple[Tensor, Tensor | None]:
    """The logits in place of u (R, T), and their slope dz/du where a soft cap makes it vary, else None."""
    if bias is not None:
        u += bias
    return transform.logits_and_slope_(u)


TORCH = Epilogue(absorb, finish, softmax_gradient, kept_gradient, low_precision=False)
