"""What the fuzzers share: tensors of every layout, and the comparison with the definition in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS32 = torch.finfo(torch.float32).eps


class Wrong(AssertionError):
    """A result that is finite where there is none, not finite where there is one, or too far from it."""


class Draw:
    """Draws what a check needs. Hypothesis chooses shapes, dtypes and seeds, a generator the numbers themselves."""

    def __init__(self, data: st.DataObject):
        self.data = data
        self.generator = torch.Generator().manual_seed(self.integer(0, 2**32))

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def one(self, *values):
        return self.data.draw(st.sampled_from(values))

    def flag(self) -> bool:
        return self.data.draw(st.booleans())

    def size(self, most: int = 40, least: int = 0) -> int:
        """A size that is often at an edge: 0, 1, 2, and around the width of a vector or a tile."""
        return self.one(*(n for n in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, most) if least <= n <= most))

    def normal(self, *shape: int, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * spread).to(dtype)

    def tensor(self, *shape: int, spread: float = 1.0, dtype: torch.dtype = torch.float32, special: bool = False):
        """Normal numbers, of which with `special` a few are NaN, infinite, 0, tiny or huge, in any memory layout."""
        t = self.normal(*shape, spread=spread, dtype=dtype)
        if special and t.numel() and self.flag():
            for _ in range(self.integer(1, 3)):
                place = self.integer(0, t.numel() - 1)
                t.view(-1)[place] = self.one(math.nan, math.inf, -math.inf, 0.0, 1e-30, 6e4, -6e4)
        return self.relaid(t)

    def relaid(self, t: Tensor) -> Tensor:
        """The same values with other strides; or its first row at every place, with a stride of 0."""
        how = self.one("as it is", "transposed", "every other", "offset", "broadcast")
        if how == "transposed" and t.dim() >= 2:
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if how == "every other" and t.dim():
            return torch.stack([t, torch.full_like(t, math.nan)], -1).flatten(-2)[..., ::2]
        if how == "offset" and t.dim():
            return torch.cat([torch.full_like(t[:1], math.nan), t])[1:] if t.shape[0] else t
        if how == "broadcast" and t.dim() and t.shape[0]:
            return t[:1].expand_as(t)
        return t

    def ids(self, *shape: int, below: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def lead(self) -> tuple[int, ...]:
        """Leading dimensions: rows, or rows of rows."""
        return self.one((self.size(),), (self.size(9), self.size(9)), (1, self.size(17)), ())


def leaves(*tensors: Tensor | None, wide: bool = False) -> list[Tensor | None]:
    """Copies that keep their strides and take gradients; with `wide` in float64."""
    return [None if t is None else (t.double() if wide else t).detach().requires_grad_() for t in tensors]


def gradients(outputs: list[Tensor], inputs: list[Tensor | None], seed: Tensor) -> list[Tensor]:
    """The gradients of a fixed weighted sum of the outputs. seed: float64, at least as many numbers as an output."""
    wanted = [t for t in inputs if t is not None]
    total = sum((o * seed[: o.numel()].view(o.shape).to(o.dtype)).sum() for o in outputs)
    if not isinstance(total, Tensor) or not total.requires_grad:
        return [torch.zeros_like(t) for t in wanted]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]


def compare(
    what: str, ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], scales: list[float], values: int = 1
) -> None:
    """Wrong unless each of our results is as near to the exact one as the plain float32 computation is, in order.

    Args:
        what: what was computed, for the error.
        ours: the results to judge.
        plain: the definition, computed in the dtype of the inputs.
        exact: the definition, computed in float64.
        scales: the size of the numbers that each result was added up from. An error of a few of their last places is
            fine.
        values: how many of the results are values; the others are gradients.
    """

    values_are_numbers = all(e.isfinite().all() for e in exact[:values])

    for i, (*results, scale) in enumerate(zip(ours, plain, exact, scales, strict=True)):
        a, p, e = (result.detach().double() for result in results)
        if a.shape != e.shape:
            raise Wrong(f"{what}[{i}] has the shape {tuple(a.shape)}, expected {tuple(e.shape)}")
        largest_there_is = torch.finfo(ours[i].dtype).max
        judged = p.isfinite() & e.isfinite() & (e.abs() < largest_there_is)  # elsewhere float32 itself overflows
        lies = a.isfinite() & e.isnan() & ~p.isfinite()
        if i >= values and not (values_are_numbers and a.isfinite().all()):
            lies = torch.zeros_like(lies)  # a loss that is no number, or one NaN in a gradient, is plain to see
        if lies.any():
            raise Wrong(f"{what}[{i}] is {a[lies][0].item()}, where there is no number")
        lost = judged & ~a.isfinite()
        if lost.any():
            raise Wrong(f"{what}[{i}] is {a[lost][0].item()}, expected {e[lost][0].item()}")
        if not judged.any():
            continue
        eps = torch.finfo(ours[i].dtype).eps
        error, of_plain = (a - e)[judged].abs().max(), (p - e)[judged].abs().max()
        largest = e[judged].abs().max()
        budget = 16 * (of_plain + eps * largest + (min(eps, EPS32)) * scale)
        if not error <= budget:
            raise Wrong(f"{what}[{i}] is off by {error.item():.3g}, at most {budget.item():.3g} is rounding")
