"""The arithmetic of divergences on tiles of logits: values, moments and gradients, and the running normaliser.

Per row, with s and t the softmax of student and teacher and m = beta t + (1 - beta) s:

    forward_kl  sum_j t log(t / s) + s - t                              c = s - t
    reverse_kl  sum_j s log(s / t) + t - s                              c = s (log(s / t) - K)   K = sum s log(s / t)
    jsd         sum_j beta t log(t / m) + (1 - beta) s log(s / m)       c = (1 - beta) s (log(s / m) - K)
                                                                                                 K = sum s log(s / m)

where c is the gradient in the student's logits, and K is called the *moment*. s - t sums to 0. With it every term of a
sum is at least 0, so nothing cancels, and a rounding error of the normalisers only counts squared.

For a divergence near 0 to keep its digits, the terms must not come from differences of rounded exponentials either.
With d = log(t / s) / 2, t - s is (s + t) tanh d, and t log(t / s) + s - t is (s + t) (d (1 + tanh d) - tanh d). And
log(t / m) is log1p((1 - beta) (t - s) / m). Where both sides have the same logits, divergence and gradient are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head.tiling import START
from fastalign.ops.head.transform import LogitTransform
from fastalign.reference import Divergence

# A divergence this large comes from entries that one side rules out (-inf), which the tiles hold as START.
RULED_OUT = 1e9


def without_distribution(top: Tensor, transform: LogitTransform) -> Tensor:
    """Which rows (R,) have no distribution, so that whatever is computed of it is NaN.

    Their logits are all -inf, or under a negative scale one of them is inf. A soft cap turns products of -inf into
    finite logits, so under it there is no such row.

    Args:
        top: (R,) the largest logit of each row, with START in the place of a product of -inf.
        transform: What made the logits from the products. A factor above 1 does not move the start of the maximum.
    """
    if transform.softcap is not None:
        return torch.zeros_like(top, dtype=torch.bool)
    return top.abs() >= -0.5 * START * min(1.0, abs(transform.factor))  # half of it: the product is rounded


class DivergenceKind(NamedTuple):
    """Which divergence."""

    name: Divergence
    beta: float  # the jsd's share of the teacher in m


# Each function below turns one tile of log s and log t, a and b (R, T), into what it adds to the value (R,) and to the
# moment (R,) or None. Both tiles end up as what `gradient` needs: s - t in a, or s in a and s times its log-ratio in b.
# x and y (R, T) are scratch.


def _forward_kl(a: Tensor, b: Tensor, x: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor | None]:
    _sum_and_half_ratio(a, b, x)  # s + t, and log(t / s) / 2 =: d
    torch.tanh(b, out=y)
    torch.addcmul(b, b, y, out=x).sub_(y)  # d (1 + tanh d) - tanh d
    value = x.mul_(a).sum(1)
    a.mul_(y.neg_())  # s - t
    return value, None


def _reverse_kl(a: Tensor, b: Tensor, x: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor | None]:
    _sum_and_half_ratio(a, b, x)
    torch.tanh(b, out=y)
    torch.addcmul(b, b, y, value=-1, out=x).sub_(y)  # d (1 - tanh d) - tanh d
    value = x.mul_(a).sum(1).neg_()
    a.addcmul_(a, y, value=-1).mul_(0.5)  # s
    b.mul_(a).mul_(-2)  # s log(s / t)
    return value, b.sum(1)


def _sum_and_half_ratio(a: Tensor, b: Tensor, x: Tensor) -> None:
    """From log s and log t: s + t into a, log(t / s) / 2 into b."""
    torch.exp(b, out=x)
    b.sub_(a).mul_(0.5)
    a.exp_().add_(x)


def _jsd(a: Tensor, b: Tensor, x: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor | None]:
    limits = torch.finfo(a.dtype)
    a.exp_()  # s
    b.exp_()  # t
    torch.sub(b, a, out=x)
    torch.add(a, x, alpha=beta, out=y).clamp_(min=limits.tiny)  # m
    x.div_(y)  # (t - s) / m
    torch.mul(x, 1 - beta, out=y).clamp_(min=limits.eps - 1).log1p_().mul_(b)  # t log(t / m)
    torch.mul(x, -beta, out=b).clamp_(min=limits.eps - 1).log1p_().mul_(a)  # s log(s / m)
    return y.mul_(beta).add_(b, alpha=1 - beta).sum(1), b.sum(1)


_TERMS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


def terms(
    a: Tensor,
    b: Tensor,
    stats: Tensor,
    kind: DivergenceKind,
    transform: LogitTransform,
    scratch: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """What one tile of logits adds to the values (R,) and to the moments (R,), None for the forward KL.

    Args:
        a: (R, T) logits of the student. Overwritten with what `gradient` needs, times the slope of a soft cap.
        b: (R, T) logits of the teacher. Overwritten likewise.
        stats: (R, 4 or more): the maximum and the logarithm of the sum of the student, then of the teacher.
        kind: Which divergence.
        transform: The student's.
        scratch: Two tensors (R, T).
    """
    slope = None if transform.softcap is None else transform.slope(a)
    # The two parts are subtracted one by one: their sum, the logsumexp, is larger and rounded more coarsely.
    a.sub_(stats[:, 0:1]).sub_(stats[:, 1:2])
    b.sub_(stats[:, 2:3]).sub_(stats[:, 3:4])
    out = _TERMS[kind.name](a, b, *scratch, kind.beta)
    if slope is not None:
        a.mul_(slope)
        b.mul_(slope)
    return out


def gradient(a: Tensor, b: Tensor, moment: Tensor, kind: DivergenceKind, transform: LogitTransform) -> Tensor:
    """The gradient `c dz/du` (R, T) of one tile in its products, from what `terms` left in a and b."""
    c = a if kind.name == "forward_kl" else b.addcmul_(a, moment.unsqueeze(1), value=-1)
    scale = gradient_scale(kind, transform)
    return c.mul_(scale) if scale != 1.0 else c


def gradient_scale(kind: DivergenceKind, transform: LogitTransform) -> float:
    """The constant factor of the gradient: what its tiles do not contain yet."""
    of_kind = 1 - kind.beta if kind.name == "jsd" else 1.0
    return of_kind * (transform.factor if transform.softcap is None else 1.0)


class LogSumExp:
    """A running logsumexp per row, as its two parts: `top + log(total)`."""

    def __init__(self, rows: int, like: Tensor):
        self.top = like.new_full((rows,), START)  # (R,) the maximum so far
        self.total = like.new_zeros(rows)  # (R,) sum exp(z - top)

    def absorb(self, z: Tensor, scratch: Tensor) -> None:
        """Fold a tile z (R, T) in; the old sum is rescaled to the new maximum."""
        top = torch.maximum(self.top, z.amax(1))
        here = torch.sub(z, top.unsqueeze(1), out=scratch).exp_().sum(1)
        self.total = self.total * (self.top - top).exp() + here
        self.top = top
