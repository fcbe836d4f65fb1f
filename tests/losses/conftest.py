"""The accuracy check shared by the loss tests: float32 values and gradients against 60-digit arithmetic."""

from __future__ import annotations

import mpmath
import pytest
import torch

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny
# Each loss is at most sixteen elementary operations deep, each within one rounding of exact.
ROUNDINGS = 16


def _derivatives(terms, at) -> tuple[list, list]:
    """The sum of the terms and its two slopes; and what a rounding can do to each: its terms' sizes and conditions."""
    orders = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))
    sums, budgets = [0, 0, 0], [0, 0, 0]
    for term in terms:
        d = {order: mpmath.diff(term, at, order) for order in orders}
        for k, (i, j) in enumerate(orders[:3]):
            sums[k] += d[i, j]
            budgets[k] += abs(d[i, j]) + abs(at[0] * d[i + 1, j]) + abs(at[1] * d[i, j + 1])
    return sums, [ROUNDINGS * (EPS * budget + TINY) for budget in budgets]


def _assert_accurate(loss, terms, points) -> None:
    """loss(a, b) on float32 tensors, and its gradients, equal the sum of terms(a, b) in mpmath at each point (a, b)."""
    a, b = (torch.tensor(column, requires_grad=True) for column in zip(*points, strict=True))
    values = loss(a, b)
    assert values.dtype == torch.float32
    computed = torch.stack((values, *torch.autograd.grad(values.sum(), (a, b))), dim=1).tolist()
    with mpmath.workdps(60):
        for point, row in zip(torch.stack((a, b), dim=1).tolist(), computed, strict=True):
            exact, budgets = _derivatives(terms, [mpmath.mpf(coordinate) for coordinate in point])
            for what, got, want, budget in zip(("value", "slope a", "slope b"), row, exact, budgets, strict=True):
                assert abs(got - want) <= budget, f"{what} at {point}: {got}, exactly {float(want)} +- {float(budget)}"


@pytest.fixture
def assert_accurate():
    return _assert_accurate


@pytest.fixture
def points():
    """Pairs (a, b) of log-ratios: margins of every size up to 1e4, either sign, around several centres."""
    margins = (0.0, 1e-4, -0.3, 3.0, -3.0, 25.0, -25.0, 90.0, -90.0, 700.0, -700.0, 1e4, -1e4)
    return [
        *((margin, 0.0) for margin in margins),
        *((-20.0, margin - 20.0) for margin in (0.0, 0.3, -18.0, 25.0, 200.0, -1e4, 1e4)),
        *((1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4)),
    ]


@pytest.fixture
def make_logprobs():
    """f(count, batch): `count` tensors (batch,) of random float64 log-probabilities that require gradients."""

    def make(count: int, batch: int = 6) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        random = [torch.rand(batch, dtype=torch.float64, generator=generator) for _ in range(count)]
        return [(-4 * values - 0.01).requires_grad_() for values in random]

    return make
