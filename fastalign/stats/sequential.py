"""Tests that may be looked at after every sample: their error rates hold at whatever moment one stops.

A usual test that is repeated as data comes in finds something sooner or later, without any change: at 20 looks a test
at 5 % is wrong in 25 % of all cases. The functions here rest on nonnegative martingales instead. By Ville's inequality
such a process, starting at 1, ever reaches `1 / alpha` with a probability of at most `alpha`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from fastalign.errors import InputError
from fastalign.stats.checks import numbers, share


def confidence_sequence(
    values: ArrayLike, *, low: float = 0.0, high: float = 1.0, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Intervals for the mean of bounded values, one after each value, that hold all at once.

    With probability `confidence` the true mean lies in every one of them. The width adapts to the variance that is
    seen. Per value x_t in [0, 1], with running mean m and variance v of the values before it,

        lambda_t = min(1/2, sqrt(2 log(2 / alpha) / (v t log(1 + t))))
        interval = sum(lambda x) / sum(lambda) ± (log(2 / alpha) + sum((x - m)^2 psi(lambda))) / sum(lambda),
        psi(lambda) = -log(1 - lambda) - lambda,

    and each interval is cut with those before it.

    Args:
        values: (n,) in the order in which they came.
        low: The least possible value.
        high: The greatest possible value.
        confidence: The probability that all intervals cover the mean.

    Returns:
        Lower and upper ends, (n,) each.

    Raises:
        InputError: A value is outside of [low, high], the bounds are not in order, or the confidence is no share.

    References:
        Waudby-Smith and Ramdas 2024, JRSS B 86:1, theorem 2, arXiv:2010.09686.
    """
    x = _scaled(values, low, high)
    t, alpha = np.arange(1, len(x) + 1), 1 - share("confidence", confidence)
    mean, variance = _before(x)
    bet = np.minimum(0.5, np.sqrt(2 * math.log(2 / alpha) / (variance * t * np.log1p(t))))
    total = np.cumsum(bet)
    center = np.cumsum(bet * x) / total
    half = (math.log(2 / alpha) + np.cumsum((x - mean) ** 2 * (-np.log1p(-bet) - bet))) / total
    lower = np.maximum.accumulate(np.maximum(center - half, 0.0))
    upper = np.minimum.accumulate(np.minimum(center + half, 1.0))
    return low + (high - low) * lower, low + (high - low) * upper


def e_process(values: ArrayLike, null_mean: float, *, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Evidence, after each value, that the mean of bounded values is above `null_mean`.

    It is the capital of a gambler who bets on greater values: `E_t = prod(1 + lambda_t (x_t - null_mean))`. The bet
    lambda_t is chosen from earlier values only, near the one that makes the capital grow fastest. If the mean is at
    most `null_mean`, the capital ever reaches `1 / alpha` with a probability of at most `alpha`: reject then. The
    product of two e-processes of independent data is one too, and so is their mean whatever their data.

    Args:
        values: (n,) in the order in which they came.
        null_mean: The mean under the hypothesis that is tested.
        low: The least possible value.
        high: The greatest possible value.

    Returns:
        (n,) the evidence after each value, at least 0.

    Raises:
        InputError: A value or `null_mean` is outside of the bounds.

    Examples:
        >>> bool(e_process([1] * 20, 0.5)[-1] > 20)
        True

    References:
        Waudby-Smith and Ramdas 2024, arXiv:2010.09686; Ville 1939.
    """
    x = _scaled(values, low, high)
    null = (null_mean - low) / (high - low)
    if not 0 < null < 1:
        raise InputError(f"null_mean is {null_mean}; expected a number between {low} and {high}, without the two")
    mean, variance = _before(x)
    gain = mean - null
    bet = np.clip(gain / (variance + gain**2), 0, 0.5 / null)  # at most half of what a loss could take
    return np.cumprod(1 + bet * (x - null))


def e_benjamini_hochberg(evidence: ArrayLike, rate: float = 0.05) -> np.ndarray:
    """Which of many hypotheses to reject, so that on average at most the share `rate` of the rejected ones is true.

    The k greatest of K e-values are rejected, for the largest k whose k-th greatest is at least `K / (rate k)`. This
    holds whatever the dependence between them, as the procedure for p-values does not.

    Args:
        evidence: (K,) e-values, for instance the present values of e-processes.
        rate: The false discovery rate.

    Returns:
        (K,) true where the hypothesis is rejected.

    Raises:
        InputError: An e-value is negative, or the rate is no share.

    References:
        Wang and Ramdas 2022, JRSS B 84:822, arXiv:2009.02824.
    """
    e = numbers("evidence", evidence)
    if (e < 0).any():
        raise InputError(f"evidence holds {e.min():g}; e-values are at least 0")
    order = np.argsort(-e, kind="stable")
    reached = np.flatnonzero(e[order] * np.arange(1, len(e) + 1) >= len(e) / share("rate", rate))
    rejected = np.zeros(len(e), dtype=bool)
    if len(reached):
        rejected[order[: reached[-1] + 1]] = True
    return rejected


def _scaled(values: ArrayLike, low: float, high: float) -> np.ndarray:
    """The values as numbers from 0 to 1."""
    x = numbers("values", values)
    if not low < high:
        raise InputError(f"low is {low} and high {high}; expected low < high")
    if x.min() < low or x.max() > high:
        raise InputError(f"values reach from {x.min():g} to {x.max():g}, outside of [{low}, {high}]: widen the bounds")
    return (x - low) / (high - low)


def _before(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the values before each one. Half a value and a quarter are added, so that they are defined.

    A bet may depend on the past alone: with the value itself in it, the martingale is lost.
    """
    t = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (t + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (t + 1)
    return np.concatenate(([0.5], mean[:-1])), np.concatenate(([0.25], variance[:-1]))
