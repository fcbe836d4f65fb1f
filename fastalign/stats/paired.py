"""Compares two models on the same items.

An item that is hard for one model is hard for the other, so the two scores of an item vary together. A paired test
looks at the differences and leaves that common part out. On 300 items with a true change of 6 points it finds the
change twice as often as a test that treats the two models as unrelated.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastalign.errors import InputError
from fastalign.stats.checks import numbers, outcomes, same_length, share


class Interval(NamedTuple):
    """An estimate with its confidence interval.

    Attributes:
        estimate: The estimate itself.
        low: The lower end of the interval.
        high: The upper end.
    """

    estimate: float
    low: float
    high: float


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """The exact two-sided p-value of McNemar's test: do two models answer equally many items correctly?

    Only items count that exactly one model answers correctly. If the models are equally good, the number that the first
    one wins is binomial with probability 1/2, whatever the other items are.

    Args:
        before: (n,) true where the first model is right.
        after: (n,) true where the second one is.

    Raises:
        InputError: A value is neither 0 nor 1, or the lengths differ.

    Examples:
        >>> round(mcnemar([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1]), 3)
        0.125

    References:
        McNemar 1947, Psychometrika 12:153.
    """
    from scipy.stats import binom

    first, second = _pair(before, after)
    lost, won = int(np.sum(first > second)), int(np.sum(second > first))
    return float(min(1.0, 2 * binom.cdf(min(lost, won), lost + won, 0.5)))


def wilson(correct: ArrayLike, confidence: float = 0.95) -> Interval:
    """The share of correct items with Wilson's score interval, which holds near 0 and 1 too.

    Args:
        correct: (n,) true where the model is right.
        confidence: The probability that the interval covers the true share.

    Raises:
        InputError: A value is neither 0 nor 1, there is none, or the confidence is no share.

    Examples:
        >>> [round(end, 3) for end in wilson([1, 1, 1, 1, 1, 1, 1, 1, 1, 1])]
        [1.0, 0.722, 1.0]

    References:
        Wilson 1927, JASA 22:209.
    """
    x = outcomes("correct", correct)
    z = NormalDist().inv_cdf(0.5 + share("confidence", confidence) / 2)
    return Interval(*_wilson(float(x.mean()), len(x), z))


def newcombe(before: ArrayLike, after: ArrayLike, confidence: float = 0.95) -> Interval:
    """The change of the share of correct items, `mean(after) - mean(before)`, with Newcombe's score interval.

    The interval joins Wilson's interval of each share, with their correlation. It stays inside [-1, 1], and holds where
    shares lie near 0 or 1, as the usual `estimate ± 1.96 standard errors` does not.

    Args:
        before: (n,) true where the first model is right.
        after: (n,) true where the second one is.
        confidence: The probability that the interval covers the true change.

    Raises:
        InputError: A value is neither 0 nor 1, the lengths differ, or the confidence is no share.

    References:
        Newcombe 1998, Statistics in Medicine 17:2635, method 10.
    """
    first, second = _pair(before, after)
    z = NormalDist().inv_cdf(0.5 + share("confidence", confidence) / 2)
    (p1, low1, high1), (p2, low2, high2) = (_wilson(float(x.mean()), len(x), z) for x in (second, first))
    phi = _correlation(first, second)
    below, above, below2, above2 = p1 - low1, high1 - p1, p2 - low2, high2 - p2
    down = below**2 - 2 * phi * below * above2 + above2**2
    up = below2**2 - 2 * phi * below2 * above + above**2
    change = p1 - p2
    return Interval(float(change), float(change - max(0.0, down) ** 0.5), float(change + max(0.0, up) ** 0.5))


def paired_bootstrap(
    before: ArrayLike, after: ArrayLike, *, clusters: ArrayLike | None = None, confidence: float = 0.95,
    repeats: int = 4000, seed: int = 0,
) -> Interval:  # fmt: skip
    """The mean change of any score, `mean(after - before)`, with a percentile interval of the bootstrap.

    Args:
        before: (n,) scores of the items under the first model.
        after: (n,) those under the second one.
        clusters: (n,) the group of each item, such as the document that a question is about. Items of one group are
            drawn together, since they are not independent. None: each item for itself.
        confidence: The probability that the interval covers the true change.
        repeats: How often items are drawn anew.
        seed: Of the draws.

    Raises:
        InputError: The lengths differ, there are fewer than two items or groups, or the confidence is no share.

    References:
        Efron and Tibshirani 1993, chapter 13; for clusters Field and Welsh 2007, JRSS B 69:369.
    """
    difference = numbers("after", after, least=2) - _aligned(before, after)
    groups = np.arange(len(difference)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    same_length(clusters=groups, after=difference)
    sums, sizes = np.bincount(groups, difference), np.bincount(groups)  # (groups,)
    if len(sums) < 2:
        raise InputError("clusters names one group for all items, so nothing is known about others: pass more groups")
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=repeats)
    means = (drawn @ sums) / (drawn @ sizes)  # (repeats,)
    tail = (1 - share("confidence", confidence)) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(difference.mean()), float(low), float(high))


def mcnemar_power(items: int, lost: float, won: float, significance: float = 0.05) -> float:
    """The probability that McNemar's exact test finds a true change.

    Args:
        items: The number of items.
        lost: Share of items that only the first model answers correctly.
        won: Share that only the second one does. The true change is `won - lost`.
        significance: The test finds a change where its p-value is at most this.

    Raises:
        InputError: The shares are negative or sum to more than 1, or there is no item.
    """
    from scipy.stats import binom

    if items < 1 or min(lost, won) < 0 or not 0 < lost + won <= 1:
        raise InputError(
            f"items is {items}, lost {lost} and won {won}; expected at least 1 item and shares whose sum is above 0 "
            "and at most 1"
        )
    differ = np.arange(items + 1)
    # The largest k with 2 P(X <= k) <= significance, for each number of items that differ; -1 where there is none.
    k = binom.ppf(significance / 2, differ, 0.5)
    k = np.where(binom.cdf(k, differ, 0.5) <= significance / 2, k, k - 1)
    of_won = won / (lost + won)
    found = binom.cdf(k, differ, of_won) + binom.sf(differ - k - 1, differ, of_won)
    found = np.where(k < 0, 0.0, found)
    return float(np.sum(binom.pmf(differ, items, lost + won) * found))


def items_needed(lost: float, won: float, power: float = 0.8, significance: float = 0.05) -> int:
    """The least number of items with which McNemar's exact test finds a change with the probability `power`.

    Args:
        lost: Share of items that only the first model answers correctly.
        won: Share that only the second one does.
        power: The probability to find the change.
        significance: See `mcnemar_power`.

    Raises:
        InputError: The shares are equal, so that there is no change, or not possible. Or a million items are too few.
    """
    share("power", power)
    if lost == won:
        raise InputError(f"lost and won are both {lost}: that is no change, which no number of items finds")
    high = 8
    while mcnemar_power(high, lost, won, significance) < power:
        high *= 2
        if high > 1_000_000:
            raise InputError(f"A change of {won - lost:+.4g} needs more than 1,000,000 items: it cannot be decided")
    low = high // 2
    while low + 1 < high:  # the power rises with the items, up to the steps of the binomial
        middle = (low + high) // 2
        low, high = (low, middle) if mcnemar_power(middle, lost, won, significance) >= power else (middle, high)
    return high


def _pair(before: ArrayLike, after: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = outcomes("before", before), outcomes("after", after)
    same_length(before=first, after=second)
    return first, second


def _aligned(before: ArrayLike, after: ArrayLike) -> np.ndarray:
    first = numbers("before", before, least=2)
    same_length(before=first, after=np.asarray(after))
    return first


def _wilson(p: float, n: int, z: float) -> tuple[float, float, float]:
    """A share with the ends of its interval, see `wilson`."""
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return p, center - half, center + half


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Newcombe's phi of two columns of outcomes, corrected for continuity if it is positive; 0 if one is constant."""
    n = len(first)
    both, neither = np.sum(first * second), np.sum((1 - first) * (1 - second))
    only_first, only_second = np.sum(first > second), np.sum(second > first)
    product = both * neither - only_first * only_second
    if product > 0:
        product = max(product - n / 2, 0)
    scale = first.sum() * (n - first.sum()) * second.sum() * (n - second.sum())
    return float(product / scale**0.5) if scale > 0 else 0.0
