"""Paired comparisons: scipy's numbers, known cases, and error rates that were counted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from fastalign.errors import InputError
from fastalign.stats import items_needed, mcnemar, mcnemar_power, newcombe, paired_bootstrap


def models(repeats: int, items: int, change: float = 0.0, seed: int = 0):
    """Outcomes of two models whose items are hard or easy for both, (repeats, items) each."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(size=(repeats, items)) * 2
    return (hardness + rng.normal(size=(repeats, items)) + shift > 0 for shift in (0.0, change))


def columns(both: int, lost: int, won: int, neither: int):
    """Outcomes with the four counts of a table of pairs."""
    before = np.repeat([1, 1, 0, 0], [both, lost, won, neither])
    return before, np.repeat([1, 0, 1, 0], [both, lost, won, neither])


@pytest.mark.parametrize("lost,won", [(0, 0), (0, 6), (3, 9), (9, 3), (5, 5), (40, 61)])
def test_mcnemar_is_the_binomial_test_of_the_items_that_differ(lost, won):
    expected = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(*columns(20, lost, won, 7)) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_seldom_alarms_and_finds_what_an_unpaired_test_misses():
    same = [mcnemar(a, b) <= 0.05 for a, b in zip(*models(1000, 300), strict=True)]
    assert np.mean(same) <= 0.05 + 0.014  # two standard errors of 1,000 repeats
    first, second = models(400, 300, change=0.35, seed=1)
    paired = np.mean([mcnemar(a, b) <= 0.05 for a, b in zip(first, second, strict=True)])
    p, q = first.mean(1), second.mean(1)
    unpaired = np.mean(abs(q - p) > 1.96 * np.sqrt((p * (1 - p) + q * (1 - q)) / 300))
    assert paired >= 1.8 * unpaired


def test_newcombe_of_a_table_worked_by_hand():
    """e, f, g, h = 20, 2, 12, 16: Wilson's limits and phi worked out step by step with a calculator."""
    change, low, high = newcombe(*columns(20, 2, 12, 16))
    assert change == pytest.approx(0.2)
    z, n = 1.959964, 50

    def wilson(p):
        middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    (low1, high1), (low2, high2) = wilson(0.64), wilson(0.44)
    phi = (20 * 16 - 12 * 2 - 25) / (32 * 18 * 22 * 28) ** 0.5
    expected_low = 0.2 - ((0.64 - low1) ** 2 - 2 * phi * (0.64 - low1) * (high2 - 0.44) + (high2 - 0.44) ** 2) ** 0.5
    expected_high = 0.2 + ((0.44 - low2) ** 2 - 2 * phi * (0.44 - low2) * (high1 - 0.64) + (high1 - 0.64) ** 2) ** 0.5
    assert (low, high) == pytest.approx((expected_low, expected_high), abs=1e-6)


def test_newcombe_covers_near_the_edge_and_stays_inside():
    """A change of 0 with 97 % right answers: the usual interval covers too seldom there."""
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(1000):
        a, b = rng.random((2, 60)) < 0.97
        _, low, high = newcombe(a, b)
        covered.append(low <= 0 <= high)
    assert np.mean(covered) >= 0.95 - 0.014
    assert newcombe([1] * 5, [1] * 5).low >= -1 and newcombe([0] * 5, [1] * 5).high <= 1


def test_the_bootstrap_covers_and_knows_clusters():
    rng = np.random.default_rng(3)
    by_item, by_cluster = [], []
    for repeat in range(300):
        groups = np.repeat(np.arange(40), 5)
        difference = rng.normal(size=40)[groups] + 0.3 * rng.normal(size=200)
        zeros = np.zeros(200)
        options = {"repeats": 400, "seed": repeat}
        by_item.append(paired_bootstrap(zeros, difference, **options))
        by_cluster.append(paired_bootstrap(zeros, difference, clusters=groups, **options))
    assert np.mean([i.low <= 0 <= i.high for i in by_cluster]) >= 0.90
    assert np.mean([i.low <= 0 <= i.high for i in by_item]) < 0.75, "items of one cluster are not independent"


@pytest.mark.parametrize("items,lost,won", [(80, 0.05, 0.15), (300, 0.10, 0.16), (40, 0.0, 0.1)])
def test_power_is_the_share_of_simulations_that_find_the_change(items, lost, won):
    rng = np.random.default_rng(4)
    table = rng.multinomial(items, [lost, won, 1 - lost - won], size=4000)
    p = [
        2 * min(0.5, binomtest(int(min(a, b)), int(a + b), alternative="less").pvalue if a + b else 1)
        for a, b, _ in table
    ]
    found = np.mean([value <= 0.05 for value in p])
    assert mcnemar_power(items, lost, won) == pytest.approx(found, abs=0.025)


def test_the_items_needed_reach_the_power():
    needed = items_needed(0.08, 0.13)
    assert mcnemar_power(needed, 0.08, 0.13) >= 0.8 > mcnemar_power(needed - 20, 0.08, 0.13)
    assert items_needed(0.08, 0.28) < needed / 5


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: mcnemar([0, 2], [0, 1]), "holds 2; expected 0 or 1"),
        (lambda: mcnemar([0, 1], [0, 1, 1]), "lengths differ"),
        (lambda: mcnemar([], []), "has 0 values"),
        (lambda: newcombe([0], [1], confidence=95), "confidence is 95; expected a number between 0 and 1"),
        (lambda: paired_bootstrap([0, 1], [1, 0], clusters=["a", "a"]), "one group for all items"),
        (lambda: paired_bootstrap([0, float("nan")], [1, 0]), "NaN or infinite"),
        (lambda: paired_bootstrap([0, 1, 2], [1, 0]), "lengths differ"),
        (lambda: items_needed(0.1, 0.1), "no change, which no number of items finds"),
        (lambda: mcnemar_power(10, 0.7, 0.7), "whose sum is above 0 and at most 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
