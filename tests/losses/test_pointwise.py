"""Losses of the single log-ratios against numbers worked out by hand from their papers, and 60-digit arithmetic."""

from __future__ import annotations

from functools import partial
from math import log

import mpmath
import pytest
import torch

from fastalign.losses.pointwise import apo_down, apo_zero, bco_pair, nca, sppo

# With beta = 1/2: beta u = ln 3, so s(beta u) = 3/4; beta v = -ln 2, so s(beta v) = 1/3; beta m = ln 6, s = 6/7.
U, V = 2 * log(3), -2 * log(2)
HALF = {"beta": 0.5}
BY_HAND = {
    "nca": (nca, HALF, log(4 / 3) + 0.5 * log(4) + 0.5 * log(3 / 2)),
    "bco_pair": (bco_pair, HALF, log(4 / 3) + log(3 / 2)),
    # s(ln 3 - ln 3) = 1/2 and s(ln 3 + ln 2) = 6/7.
    "bco_pair, shifted": (bco_pair, HALF | {"delta": log(3)}, log(2) + log(7 / 6)),
    "sppo": (sppo, HALF, (2 * log(3) - 1) ** 2 + (1 - 2 * log(2)) ** 2),
    "apo_zero": (apo_zero, HALF, 1 / 4 + 1 / 3),
    "apo_down": (apo_down, HALF, 3 / 4 + 1 / 7),
}
TOLERANCE = 32 * torch.finfo(torch.float64).eps * 12  # 32 roundings of inputs up to 12


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    loss, options, expected = BY_HAND[case]
    values = loss(column(-10 + U), column(-12 + V), column(-10), column(-12), **options)
    assert values.tolist() == pytest.approx([expected], abs=TOLERANCE)


# The papers' formulas in exact arithmetic; apo_down's two terms, whose slopes can cancel, one by one.
def sigma(x):
    return 1 / (1 + mpmath.exp(-x))


def nll(x):
    return -mpmath.log(sigma(x)) if x > 0 else mpmath.log1p(mpmath.exp(-x))


EXACT = {
    nca: lambda u, v, b: nll(b * u) + nll(-b * u) / 2 + nll(-b * v) / 2,
    bco_pair: lambda u, v, b, delta=0: nll(b * u - delta) + nll(delta - b * v),
    sppo: lambda u, v, b: (u - 1 / (2 * b)) ** 2 + (v + 1 / (2 * b)) ** 2,
    apo_zero: lambda u, v, b: sigma(-b * u) + sigma(b * v),
    apo_down: (lambda u, v, b: sigma(b * u), lambda u, v, b: sigma(b * (v - u))),
}
ACCURACY_CASES = [
    (nca, {}),
    (bco_pair, {"delta": 0.7}),
    (sppo, {}),
    (apo_zero, {}),
    (apo_down, {}),
]


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(("loss", "options"), ACCURACY_CASES)
def test_float32_is_accurate_at_any_margin(loss, options, beta, assert_accurate, points):
    def on_ratios(u, v):
        return loss(u, v, torch.zeros_like(u), torch.zeros_like(v), beta=beta, **options)

    terms = EXACT[loss] if isinstance(EXACT[loss], tuple) else (EXACT[loss],)
    assert_accurate(on_ratios, [partial(term, b=mpmath.mpf(beta), **options) for term in terms], points)
