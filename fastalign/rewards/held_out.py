"""How good a reward model is on held-out pairs: accuracy, by length too, and whether its probabilities are right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastalign.errors import InputError
from fastalign.stats.calibration import expected_calibration_error, isotonic

_BINS = 10


def pair_report(chosen: ArrayLike, rejected: ArrayLike, lengths: tuple[ArrayLike, ArrayLike]) -> dict[str, Any]:
    """What scores of held-out pairs say of a reward model.

    A model of Bradley and Terry states that the answer with the higher score wins with the probability
    `s(|chosen - rejected|)`. The expected calibration error compares these probabilities with how often that answer is
    the chosen one. It is also given after isotonic calibration, fitted on each half and measured on the other.

    Args:
        chosen: (P,) scores of the chosen answers.
        rejected: (P,) scores of the rejected answers.
        lengths: (P,) tokens of the chosen, and (P,) of the rejected answers.

    Returns:
        - `pairs`, `accuracy` (a tie counts half), `margin`, the mean difference of the scores;
        - `accuracy_chosen_longer` and `accuracy_chosen_shorter` with their `pairs_...`: far apart, they say that the
          model has learnt length. None where there is no such pair;
        - `length_slope`: the slope of the score over the length, in scores per 100 tokens, over all answers;
        - `ece` and `ece_calibrated`: None for fewer than 40 pairs.

    Raises:
        InputError: There is no pair, or the lengths of the arguments differ.
    """
    c, r = (np.asarray(values, dtype=float) for values in (chosen, rejected))
    long_c, long_r = (np.asarray(values, dtype=float) for values in lengths)
    if not len(c) or not len(c) == len(r) == len(long_c) == len(long_r):
        raise InputError(f"There are {len(c)} and {len(r)} scores of {len(long_c)} pairs; pass one of each, of some")
    right = (np.sign(c - r) + 1) / 2
    report: dict[str, Any] = {"pairs": len(c), "accuracy": right.mean(), "margin": (c - r).mean()}
    for name, some in (("chosen_longer", long_c > long_r), ("chosen_shorter", long_c < long_r)):
        report[f"accuracy_{name}"] = right[some].mean() if some.any() else None
        report[f"pairs_{name}"] = int(some.sum())
    every, scores = np.concatenate([long_c, long_r]), np.concatenate([c, r])
    spread = every.var()
    slope = 100 * np.mean((every - every.mean()) * (scores - scores.mean())) / spread if spread else None
    report |= {"length_slope": slope, **_calibration(np.abs(c - r), (c > r).astype(float))}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in report.items()}


def _calibration(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float | None]:
    if len(confidence) < 4 * _BINS:
        return {"ece": None, "ece_calibrated": None}
    order = np.random.default_rng(0).permutation(len(confidence))
    halves = order[::2], order[1::2]
    calibrated = np.empty(len(confidence))
    for fitted, measured in (halves, halves[::-1]):
        calibrated[measured] = isotonic(confidence[fitted], correct[fitted])(confidence[measured])
    return {
        "ece": expected_calibration_error(1 / (1 + np.exp(-confidence)), correct, _BINS),
        "ece_calibrated": expected_calibration_error(calibrated, correct, _BINS),
    }
