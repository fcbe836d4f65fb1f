"""Calibration and abstention on numbers whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from fastalign.errors import InputError
from fastalign.stats import brier_score, expected_calibration_error, isotonic, risk_coverage


def overconfident(n: int, seed: int = 0):
    """Scores whose true probability is 0.5 + (score - 0.5) / 2, and outcomes."""
    rng = np.random.default_rng(seed)
    scores = rng.random(n)
    return scores, rng.random(n) < 0.25 + scores / 2


def test_isotonic_regression_mends_overconfidence_on_other_items():
    fit = isotonic(*overconfident(20_000))
    scores, correct = overconfident(20_000, seed=1)
    by_chance = 0.8 * (15 * 0.25 / 20_000) ** 0.5
    assert expected_calibration_error(scores, correct) > 0.1
    assert expected_calibration_error(fit(scores), correct) < 2 * by_chance  # two sets of items were drawn
    assert (np.diff(fit(np.linspace(-1, 2, 50))) >= 0).all()


def test_isotonic_pools_what_falls():
    fit = isotonic([1, 2, 3, 3], [0, 1, 0, 0])
    np.testing.assert_allclose(fit([1, 2, 3]), [0, 1 / 3, 1 / 3])


def test_scores_of_a_few_items():
    assert brier_score([1, 0, 0.5], [1, 0, 1]) == pytest.approx(0.25 / 3)
    assert expected_calibration_error([0.9, 0.9, 0.1, 0.1], [1, 1, 1, 0], bins=2) == pytest.approx((0.1 + 0.4) / 2)


def test_the_error_expected_by_chance_is_as_stated():
    rng = np.random.default_rng(2)
    p = np.full(2000, 0.3)
    found = np.mean([expected_calibration_error(p, rng.random(2000) < 0.3) for _ in range(50)])
    assert found == pytest.approx(0.8 * (15 * 0.3 * 0.7 / 2000) ** 0.5, rel=0.15)


def test_risk_falls_with_coverage_and_equal_confidences_go_together():
    found = risk_coverage([0.9, 0.8, 0.8, 0.1], [1, 1, 0, 0])
    np.testing.assert_allclose(found.coverage, [0.25, 0.75, 0.75, 1])
    np.testing.assert_allclose(found.risk, [0, 1 / 3, 1 / 3, 0.5])
    assert found.area == pytest.approx((0 + 1 / 3 + 1 / 3 + 0.5) / 4)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: brier_score([1.2], [1]), "from 1.2 to 1.2; expected numbers from 0 to 1"),
        (lambda: brier_score([0.2, 0.1], [1]), "lengths differ"),
        (lambda: expected_calibration_error([0.5], [1], bins=3), "bins is 3; expected 1 to 1"),
        (lambda: isotonic([0.5], [0.5]), "holds 0.5; expected 0 or 1"),
        (lambda: isotonic(["a"], [0]), "no numbers"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
