"""Do two sets of vectors come from one distribution, and how far apart are they?

A p-value alone says little: with enough rows every difference is significant. So each test also gives an effect size
that does not grow with the rows, the AUC of a classifier that tells the two sets apart: 0.5 is no difference.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastalign.errors import InputError
from fastalign.stats.checks import numbers


class TwoSample(NamedTuple):
    """The outcome of `two_sample_test`.

    Attributes:
        statistic: The distance that was tested.
        p_value: The share of random relabellings with at least that distance.
        auc: The effect size, see `domain_auc`.
    """

    statistic: float
    p_value: float
    auc: float


STATISTICS = ("energy", "mmd", "auc")
_FOLDS = 5


def energy_distance(x: ArrayLike, y: ArrayLike) -> float:
    """The unbiased energy distance `2 E|x - y| - E|x - x'| - E|y - y'|`, with Euclidean distances.

    It is 0 in the mean if both samples have one distribution, and may then be negative. Pairs of a row with itself are
    left out: with them the estimate is above 0 for small samples without any difference.

    Args:
        x: (n, d) with at least 2 rows.
        y: (m, d), likewise.

    Raises:
        InputError: The widths differ, a value is not finite, or a sample has fewer than 2 rows.

    References:
        Székely and Rizzo 2013, Journal of Statistical Planning and Inference 143:1249.
    """
    a, b = _samples(x, y)
    return float(_contrast(_pooled_distances(a, b), _labels(a, b)[None])[0])


def maximum_mean_discrepancy(x: ArrayLike, y: ArrayLike, bandwidth: float | None = None) -> float:
    """The unbiased squared MMD, `E k(x, x') + E k(y, y') - 2 E k(x, y)`, with `k = exp(-|x - y|^2 / (2 bandwidth^2))`.

    Args:
        x: (n, d) with at least 2 rows.
        y: (m, d), likewise.
        bandwidth: Of the kernel; None: the median distance of all rows.

    Raises:
        InputError: The widths differ, a value is not finite, a sample has fewer than 2 rows, or all rows are equal.

    References:
        Gretton et al. 2012, JMLR 13:723.
    """
    a, b = _samples(x, y)
    return float(_contrast(-_kernel(_pooled_distances(a, b), bandwidth), _labels(a, b)[None])[0])


def domain_auc(x: ArrayLike, y: ArrayLike, *, ridge: float = 1.0, seed: int = 0) -> float:
    """How well a linear classifier tells two samples apart: the area under its ROC curve, on rows held out.

    It is the probability that a row of `y` gets a higher score than one of `x`. The classifier is a ridge regression on
    standardised columns, in 5 folds. 0.5: no difference that a line finds. Values below 0.5 are chance.

    Args:
        x: (n, d) with at least 5 rows.
        y: (m, d), likewise.
        ridge: Strength of the penalty.
        seed: Of the folds.

    Raises:
        InputError: The widths differ, a value is not finite, or a sample has fewer than 5 rows.
    """
    a, b = _samples(x, y, least=_FOLDS)
    return float(_held_out_auc(np.concatenate([a, b]), _labels(a, b)[None], ridge, seed)[0])


def two_sample_test(
    x: ArrayLike, y: ArrayLike, statistic: str = "energy", *, permutations: int = 499, seed: int = 0
) -> TwoSample:
    """A permutation test of whether two samples have one distribution, with an effect size.

    The labels of the pooled rows are shuffled `permutations` times. The p-value `(1 + count) / (1 + permutations)` is
    exact: under one distribution it is at most 0.05 in at most 5 % of all cases, for any number of rows and columns.
    The rows must be independent: draw one row per document or conversation.

    Args:
        x: (n, d) with at least 5 rows.
        y: (m, d), likewise.
        statistic: "energy" for `energy_distance`, "mmd" for `maximum_mean_discrepancy`, "auc" for `domain_auc`.
        permutations: How often labels are shuffled; the p-value is at least `1 / (1 + permutations)`.
        seed: Of the shuffles and folds.

    Raises:
        InputError: The statistic is unknown, the widths differ, a value is not finite, or a sample is too small.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> found = two_sample_test(rng.normal(size=(80, 3)), rng.normal(1.0, 1.0, size=(80, 3)))
        >>> found.p_value < 0.01 and found.auc > 0.8
        True
    """
    if statistic not in STATISTICS:
        raise InputError(f"statistic is {statistic!r}; expected one of {', '.join(STATISTICS)}")
    a, b = _samples(x, y, least=_FOLDS)
    rows, labels = np.concatenate([a, b]), _labels(a, b)
    rng = np.random.default_rng(seed)
    shuffled = np.stack([labels, *(rng.permutation(labels) for _ in range(permutations))])  # (1 + permutations, n + m)
    auc = float(_held_out_auc(rows, labels[None], 1.0, seed)[0])
    if statistic == "auc":
        found = _held_out_auc(rows, shuffled, 1.0, seed)
    else:
        distances = _pooled_distances(a, b)
        found = _contrast(distances if statistic == "energy" else -_kernel(distances, None), shuffled)
    reached = np.sum(found[1:] >= found[0] - 1e-12 * abs(found[0]))
    return TwoSample(float(found[0]), float((1 + reached) / (1 + permutations)), auc)


def _samples(x: ArrayLike, y: ArrayLike, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    a, b = numbers("x", x, ndim=2, least=least), numbers("y", y, ndim=2, least=least)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"x has {a.shape[1]} columns and y {b.shape[1]}; expected vectors of one width")
    return a, b


def _labels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n + m,) false for rows of the first sample, true for those of the second."""
    return np.arange(len(a) + len(b)) >= len(a)


def _pooled_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n + m, n + m) Euclidean distances of all rows."""
    from scipy.spatial.distance import cdist

    rows = np.concatenate([a, b])
    return cdist(rows, rows)


def _kernel(distances: np.ndarray, bandwidth: float | None) -> np.ndarray:
    if bandwidth is None:
        bandwidth = float(np.median(distances[np.triu_indices(len(distances), 1)]))
    if not bandwidth > 0:
        raise InputError(f"bandwidth is {bandwidth}, as the median distance of equal rows is; expected more than 0")
    return np.exp(-(distances**2) / (2 * bandwidth**2))


def _contrast(matrix: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`2 mean(between) - mean(within x) - mean(within y)` of a matrix of pairs, for each row of labels, (P,)."""
    np.fill_diagonal(matrix, 0)  # a row with itself does not count
    second = labels.astype(np.float64)  # (P, N)
    first = 1 - second
    to_second = second @ matrix  # (P, N)
    within_second = np.sum(to_second * second, 1)
    between = np.sum(to_second * first, 1)
    within_first = matrix.sum() - within_second - 2 * between
    n, m = first.sum(1), second.sum(1)
    return 2 * between / (n * m) - within_first / (n * (n - 1)) - within_second / (m * (m - 1))


def _held_out_auc(rows: np.ndarray, labels: np.ndarray, ridge: float, seed: int) -> np.ndarray:
    """The AUC of held-out scores for each row of labels, (P,).

    The scores of a ridge regression are linear in its labels, so one matrix per fold serves all shuffles.
    """
    fold = np.random.default_rng(seed).permutation(len(rows)) % _FOLDS
    auc = np.zeros(len(labels))
    for k in range(_FOLDS):
        train, test = rows[fold != k], rows[fold == k]
        mean, spread = train.mean(0), train.std(0)
        spread[spread == 0] = 1
        a, b = (train - mean) / spread, (test - mean) / spread
        map_ = _ridge_map(a, b, ridge)  # (train, test)
        targets = labels[:, fold != k].astype(np.float64)
        scores = (targets - targets.mean(1, keepdims=True)) @ map_  # (P, test)
        auc += _auc(scores, labels[:, fold == k]) / _FOLDS
    return auc


def _ridge_map(train: np.ndarray, test: np.ndarray, ridge: float) -> np.ndarray:
    """The matrix that takes centred labels of `train` to the scores of `test`, (train, test).

    It is `K (K + ridge)^-1` with inner products K per column. The smaller of two equal forms is solved: rows may be
    fewer than columns.
    """
    n, d = train.shape
    if n < d:
        return np.linalg.solve(train @ train.T / d + ridge * np.eye(n), train @ test.T / d)
    return train @ np.linalg.solve(train.T @ train / d + ridge * np.eye(d), test.T / d)


def _auc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probability that a score with label true is above one with label false, ties as halves, (P,)."""
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=1)
    m = labels.sum(1)
    n = labels.shape[1] - m
    pairs = np.maximum(n * m, 1)
    area = (np.sum(ranks * labels, 1) - m * (m + 1) / 2) / pairs
    return np.where(n * m > 0, area, 0.5)  # a fold with one label says nothing
