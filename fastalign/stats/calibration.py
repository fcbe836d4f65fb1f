"""Are stated probabilities right, how to mend them, and what abstaining would gain."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastalign.errors import InputError
from fastalign.stats.checks import numbers, outcomes, same_length


class Isotonic(NamedTuple):
    """A rising step function from scores to probabilities, joined by straight lines; call it with scores.

    Attributes:
        scores: (k,) rising.
        probabilities: (k,) of the scores, never falling.
    """

    scores: np.ndarray
    probabilities: np.ndarray

    def __call__(self, scores: ArrayLike) -> np.ndarray:
        """The calibrated probabilities of scores, (n,). Scores outside of those seen get the nearest one's."""
        return np.interp(numbers("scores", scores), self.scores, self.probabilities)


class RiskCoverage(NamedTuple):
    """What answering only where confidence is highest would give.

    Attributes:
        coverage: (n,) share of items that are answered, rising to 1.
        risk: (n,) share of wrong answers among them.
        threshold: (n,) the least confidence that is answered.
        area: The mean risk over all coverages; less is better.
    """

    coverage: np.ndarray
    risk: np.ndarray
    threshold: np.ndarray
    area: float


def isotonic(scores: ArrayLike, correct: ArrayLike) -> Isotonic:
    """The calibration that fits best among all that never fall.

    Fit it on items that are not used to measure calibration afterwards.

    Args:
        scores: (n,) confidences, rewards or logits; only their order matters.
        correct: (n,) 0 or 1.

    Raises:
        InputError: The lengths differ, or an outcome is neither 0 nor 1.

    References:
        Zadrozny and Elkan 2002, KDD:694; Barlow et al. 1972 (pool adjacent violators).
    """
    from scipy.optimize import isotonic_regression

    x, y = numbers("scores", scores), outcomes("correct", correct)
    same_length(scores=x, correct=y)
    values, place, count = np.unique(x, return_inverse=True, return_counts=True)  # equal scores get one probability
    fit = isotonic_regression(np.bincount(place, y) / count, weights=count)
    return Isotonic(values, np.asarray(fit.x))


def brier_score(probabilities: ArrayLike, correct: ArrayLike) -> float:
    """The mean squared error of probabilities, `mean((p - y)^2)`; 0 is perfect, 0.25 is "always 0.5".

    Args:
        probabilities: (n,) from 0 to 1.
        correct: (n,) 0 or 1.

    Raises:
        InputError: A probability is outside of [0, 1], an outcome neither 0 nor 1, or the lengths differ.

    References:
        Brier 1950, Monthly Weather Review 78:1.
    """
    p, y = _probabilities(probabilities, correct)
    return float(np.mean((p - y) ** 2))


def expected_calibration_error(probabilities: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """How far stated probabilities are from the shares that come true: `sum(n_b / n |mean p - mean y|)` over bins.

    The bins hold equally many items. Bins of equal width leave most of them nearly empty for confident models. The
    estimate is above 0 by chance for few items: with perfect calibration it is about `0.8 sqrt(bins p (1 - p) / n)`.

    Args:
        probabilities: (n,) from 0 to 1.
        correct: (n,) 0 or 1.
        bins: The number of bins, at most n.

    Raises:
        InputError: A probability is outside of [0, 1], an outcome neither 0 nor 1, or the lengths or bins do not fit.

    References:
        Naeini et al. 2015, AAAI:2901; Guo et al. 2017, arXiv:1706.04599.
    """
    p, y = _probabilities(probabilities, correct)
    if not 1 <= bins <= len(p):
        raise InputError(f"bins is {bins}; expected 1 to {len(p)}, the number of items")
    order = np.argsort(p, kind="stable")
    groups = np.array_split(order, bins)
    return float(sum(len(group) * abs(p[group].mean() - y[group].mean()) for group in groups) / len(p))


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> RiskCoverage:
    """The share of wrong answers as a function of the share of items that is answered at all.

    Items are answered in the order of falling confidence. Items of equal confidence are answered together, so only the
    last of them gives a point that can be chosen; the earlier ones repeat its risk.

    Args:
        confidence: (n,) any score that says how sure the model is.
        correct: (n,) 0 or 1.

    Raises:
        InputError: The lengths differ, or an outcome is neither 0 nor 1.

    References:
        Geifman and El-Yaniv 2017, arXiv:1705.08500.
    """
    score, y = numbers("confidence", confidence), outcomes("correct", correct)
    same_length(confidence=score, correct=y)
    order = np.argsort(-score, kind="stable")
    score, wrong = score[order], np.cumsum(1 - y[order])
    # The last place of each run of equal confidences, for every item.
    last = np.searchsorted(-score, -score, side="right") - 1
    risk = wrong[last] / (last + 1)
    return RiskCoverage((last + 1) / len(y), risk, score, float(risk.mean()))


def _probabilities(probabilities: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    p, y = numbers("probabilities", probabilities), outcomes("correct", correct)
    same_length(probabilities=p, correct=y)
    if p.min() < 0 or p.max() > 1:
        raise InputError(f"probabilities reach from {p.min():g} to {p.max():g}; expected numbers from 0 to 1")
    return p, y
