"""Losses without a reference against numbers worked out by hand from their papers, and 60-digit arithmetic."""

from __future__ import annotations

from functools import partial
from math import log

import mpmath
import pytest
import torch

from fastalign.errors import InputError
from fastalign.losses.reference_free import cpo, orpo, simpo

HALF = {"beta": 0.5}
# x = 2 ((1/2 + ln 2 / 2) - 1/2) = ln 2 for simpo; x = 1/2 (2 ln 3) for cpo; odds 3 and 1/2 for orpo.
BY_HAND = {
    "simpo": (simpo, (-1.0, -1.5 - log(2) / 2), {"beta": 2.0, "gamma_beta_ratio": 0.5}, log(3 / 2)),
    "cpo": (cpo, (-4.0, -4.0 - 2 * log(3)), HALF, log(4 / 3)),
    "cpo, smoothed": (cpo, (-4.0, -4.0 - 2 * log(3)), HALF | {"label_smoothing": 0.1}, 0.9 * log(4 / 3) + 0.1 * log(4)),
    "orpo": (orpo, (log(3 / 4), log(1 / 3)), HALF, 0.5 * log(7 / 6)),
}
TOLERANCE = 32 * torch.finfo(torch.float64).eps * 12  # 32 roundings of inputs up to 12


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    loss, (chosen, rejected), options, expected = BY_HAND[case]
    assert loss(column(chosen), column(rejected), **options).tolist() == pytest.approx([expected], abs=TOLERANCE)


def sigma(x):
    return 1 / (1 + mpmath.exp(-x))


def nll(x):
    return -mpmath.log(sigma(x)) if x > 0 else mpmath.log1p(mpmath.exp(-x))


def exact_cpo(c, r):
    x, e = mpmath.mpf(0.1) * (c - r), 0.1
    return (1 - e) * nll(x) + e * nll(-x)


def exact_log_odds(a):
    return a - mpmath.log(-mpmath.expm1(a))


def test_cpo_and_simpo_float32_is_accurate_at_any_margin(assert_accurate, points):
    assert_accurate(partial(cpo, label_smoothing=0.1), [exact_cpo], points)
    assert_accurate(partial(simpo, beta=2.0), [lambda c, r: nll(2 * (c - r - mpmath.mpf(0.5)))], points)


def test_orpo_float32_is_accurate_up_to_probability_one(assert_accurate):
    # -1e-7 is the last step of float32 below an average of sums near -1.
    averages = (-1e-7, -1e-3, -0.69, -0.7, -2.0, -30.0, -1e3, -1e4)
    points = [(a, b) for a in averages for b in averages]
    assert_accurate(orpo, [lambda c, r: mpmath.mpf(0.1) * nll(exact_log_odds(c) - exact_log_odds(r))], points)


def test_orpo_is_finite_where_an_average_has_rounded_to_probability_one():
    chosen = torch.tensor([0.0, -1.0, 0.0, 1e-6], requires_grad=True)
    rejected = torch.tensor([-1.0, 0.0, 0.0, 0.0], requires_grad=True)
    values = orpo(chosen, rejected)
    grads = torch.autograd.grad(values.sum(), (chosen, rejected))
    assert torch.isfinite(torch.stack((values, *grads))).all()
    assert values[0] < 1e-12 and values[1] > 8.0  # ln of the odds of the largest average below 0 is 87
    assert values[2].item() == values[3].item() == pytest.approx(0.1 * log(2), rel=1e-6)


def test_smoothing_moves_the_minimum_of_simpo_to_its_log_odds():
    # The slope vanishes where s(x) = 1 - e: x = ln 4 at e = 0.2, chosen - rejected = ln 4 / 2 + 1/2.
    chosen = column(log(4) / 2 + 0.5).requires_grad_()
    (slope,) = torch.autograd.grad(simpo(chosen, column(0.0), beta=2.0, label_smoothing=0.2).sum(), chosen)
    assert slope.item() == pytest.approx(0.0, abs=TOLERANCE)


def test_a_target_margin_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="gamma_beta_ratio is nan"):
        simpo(torch.zeros(3), torch.zeros(3), gamma_beta_ratio=float("nan"))
