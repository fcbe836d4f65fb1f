"""Do annotators agree, and what is the truth behind their labels?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastalign.errors import InputError

LEVELS = ("nominal", "ordinal", "interval")


class DawidSkene(NamedTuple):
    """What `dawid_skene` finds about items and annotators.

    Attributes:
        probabilities: (items, K) of each class being an item's true one.
        confusion: (annotators, K, K), the probability that an annotator gives label j to an item of class i.
        prior: (K,) shares of the classes.
    """

    probabilities: np.ndarray
    confusion: np.ndarray
    prior: np.ndarray


def krippendorff_alpha(ratings: ArrayLike, level: str = "nominal") -> float:
    """How far annotators agree beyond chance: `alpha = 1 - observed / expected disagreement`.

    1 is full agreement and 0 what chance gives; below 0 they contradict each other. Items with fewer than two ratings
    do not count.

    Args:
        ratings: (annotators, items), NaN where an annotator did not rate an item.
        level: How ratings differ. "nominal": equal or not. "ordinal": by the ranks between them. "interval": by the
            square of their difference.

    Raises:
        InputError: The level is unknown, no item has two ratings, or all ratings are equal, so that agreement cannot be
            told from chance.

    Examples:
        >>> krippendorff_alpha([[1, 2, 3, 3], [1, 2, 3, 2]])
        0.6956521739130435

    References:
        Krippendorff 2011, Computing Krippendorff's Alpha-Reliability.
    """
    if level not in LEVELS:
        raise InputError(f"level is {level!r}; expected one of {', '.join(LEVELS)}")
    table = _ratings(ratings)
    table = table[:, (~np.isnan(table)).sum(0) >= 2]
    if not table.size:
        raise InputError("No item has two ratings, so agreement cannot be measured: pass more ratings per item")
    values, place = np.unique(table[~np.isnan(table)], return_inverse=True)
    if len(values) < 2:
        raise InputError(f"All ratings are {values[0]:g}, so agreement cannot be told from chance: pass other items")
    counts = np.zeros((table.shape[1], len(values)))  # (items, values): how often an item got a value
    np.add.at(counts, (np.nonzero(~np.isnan(table))[1], place), 1)
    size = counts.sum(1, keepdims=True)
    # Pairs of ratings of one item, each item weighted by its ratings: Krippendorff's coincidence matrix.
    coincidence = (counts / (size - 1)).T @ counts - np.diag((counts / (size - 1)).sum(0))
    total = coincidence.sum(1)
    difference = _differences(values, total, level)
    expected = np.outer(total, total)
    return float(1 - (total.sum() - 1) * np.sum(coincidence * difference) / np.sum(expected * difference))


def dawid_skene(labels: ArrayLike, *, iterations: int = 200, tolerance: float = 1e-6) -> DawidSkene:
    """The true classes of items and each annotator's habits, from labels that disagree (EM).

    Annotators differ in quality and in what they confuse, so a vote of all with equal weight wastes what the good ones
    know. `probabilities` are soft labels: their doubt can become the label smoothing of a preference loss.

    Args:
        labels: (annotators, items) whole numbers from 0 to K - 1, NaN or -1 where there is no label.
        iterations: At most this many steps of EM.
        tolerance: EM stops where no probability changes by more.

    Raises:
        InputError: A label is no whole number, an item has no label, there is only one class, or no iteration.

    References:
        Dawid and Skene 1979, Applied Statistics 28:20.
    """
    table = _ratings(labels)
    given = ~np.isnan(table) & (table != -1)
    if (table[given] != np.floor(table[given])).any() or (table[given] < 0).any():
        raise InputError("labels holds values that are no whole numbers from 0 on: number the classes 0, 1, 2, ...")
    if not given.any(0).all():
        raise InputError(f"{np.sum(~given.any(0))} items have no label at all: leave them out")
    classes = int(table[given].max()) + 1
    if classes < 2:
        raise InputError("All labels are 0: with one class there is nothing to find")
    hot = np.where(given[..., None], np.where(given, table, 0)[..., None] == np.arange(classes), 0).astype(float)
    probabilities = hot.sum(0) / hot.sum((0, 2))[:, None]  # (items, K): the vote of all, to start from
    if iterations < 1:
        raise InputError(f"iterations is {iterations}; expected at least 1")
    prior = confusion = np.empty(0)
    for _ in range(iterations):
        prior = probabilities.mean(0)
        # A hundredth of a label is added, so that no annotator is taken to be infallible.
        confusion = np.einsum("ik,aij->akj", probabilities, hot) + 0.01
        confusion /= confusion.sum(2, keepdims=True)
        log = np.einsum("aij,akj->ik", hot, np.log(confusion)) + np.log(np.maximum(prior, 1e-300))
        updated = np.exp(log - log.max(1, keepdims=True))
        updated /= updated.sum(1, keepdims=True)
        change = np.abs(updated - probabilities).max()
        probabilities = updated
        if change <= tolerance:
            break
    return DawidSkene(probabilities, confusion, prior)


def _ratings(values: ArrayLike) -> np.ndarray:
    """(annotators, items) float64, NaN where nothing was given."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise InputError(
            f"ratings have the shape {table.shape}; expected (annotators, items), NaN where one is missing"
        )
    if np.isinf(table).any():
        raise InputError("ratings hold infinite values; use NaN where a rating is missing")
    return table


def _differences(values: np.ndarray, total: np.ndarray, level: str) -> np.ndarray:
    """Krippendorff's squared difference of each pair of values, (values, values)."""
    if level == "nominal":
        return 1 - np.eye(len(values))
    # Ordinal: ratings between two values, the two themselves by half.
    position = np.cumsum(total) - total / 2 if level == "ordinal" else values
    return (position[:, None] - position[None]) ** 2
