"""Two samples: distances against their definitions, false alarms counted, effects that do not grow with the rows."""

from __future__ import annotations

import numpy as np
import pytest

from fastalign.errors import InputError
from fastalign.stats import domain_auc, energy_distance, maximum_mean_discrepancy, two_sample_test


def samples(n: int, m: int, shift: float = 0.0, seed: int = 0, d: int = 4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) + shift


def mean_over_pairs(x, y, f, *, same: bool):
    return np.mean([f(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if not (same and i == j)])


def test_the_distances_are_their_definitions():
    x, y = samples(7, 9, 0.5)
    for found, f, sign in (
        (energy_distance(x, y), lambda a, b: np.linalg.norm(a - b), 1),
        (maximum_mean_discrepancy(x, y, 1.5), lambda a, b: np.exp(-np.sum((a - b) ** 2) / 4.5), -1),
    ):
        between = mean_over_pairs(x, y, f, same=False)
        within = mean_over_pairs(x, x, f, same=True) + mean_over_pairs(y, y, f, same=True)
        assert found == pytest.approx(sign * (2 * between - within), rel=1e-12)


def test_unbiased_without_a_difference():
    """As wide as hidden states: distances with a row's distance to itself would be far above 0 here."""
    values = [energy_distance(*samples(20, 20, seed=seed, d=500)) for seed in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5


@pytest.mark.parametrize("statistic", ["energy", "mmd", "auc"])
def test_false_alarms_are_as_rare_as_promised_and_a_shift_is_found(statistic):
    options = {"statistic": statistic, "permutations": 99}
    p = [two_sample_test(*samples(25, 35, seed=seed), **options).p_value for seed in range(300)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 0.025  # two standard errors of 300 repeats
    assert np.mean(np.array(p) <= 0.5) == pytest.approx(0.5, abs=0.06)
    found = [two_sample_test(*samples(40, 40, 0.6, seed=seed), **options).p_value <= 0.05 for seed in range(40)]
    assert np.mean(found) >= 0.9


def test_the_effect_does_not_grow_with_the_rows_while_significance_does():
    small, large = (np.mean([domain_auc(*samples(n, n, 0.3, seed=s)) for s in range(8)]) for n in (200, 2000))
    assert small == pytest.approx(large, abs=0.04)
    assert large == pytest.approx(0.66, abs=0.02)  # P(N(0.6, 1) > N(0, 1) difference): Phi(0.6 / sqrt 2)
    assert (
        two_sample_test(*samples(400, 400, 0.1, seed=1)).p_value
        < two_sample_test(*samples(30, 30, 0.1, seed=1)).p_value
    )


def test_wide_rows_give_what_narrow_ones_do():
    """More columns than rows take another form of the same regression."""
    x, y = samples(60, 60, 0.5, d=3)
    blank = np.zeros((60, 200))
    wide = [np.concatenate([rows, blank], 1) for rows in (x, y)]
    assert domain_auc(*wide, ridge=3 / 203) == pytest.approx(domain_auc(x, y), abs=1e-12)


def test_equal_rows_and_tiny_samples_do_not_break_it():
    same = np.ones((6, 3))
    assert two_sample_test(same, same).p_value == 1.0
    assert domain_auc(same, same) == 0.5


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: energy_distance(np.zeros((3, 2)), np.zeros((3, 4))), "2 columns and y 4"),
        (lambda: energy_distance(np.zeros((1, 2)), np.zeros((3, 2))), "x has 1 value; at least 2"),
        (lambda: energy_distance(np.zeros(3), np.zeros((3, 2))), r"shape \(3,\); expected 2 dimensions"),
        (lambda: maximum_mean_discrepancy(np.ones((3, 2)), np.ones((3, 2))), "bandwidth is 0.0"),
        (lambda: two_sample_test(np.ones((6, 2)), np.ones((6, 2)), "ks"), "statistic is 'ks'; expected one of energy"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
