"""What scores of held-out pairs say of a reward model."""

from __future__ import annotations

import numpy as np
import pytest

from fastalign.errors import InputError
from fastalign.rewards.held_out import pair_report


def test_accuracy_by_length():
    report = pair_report([2, 1, 0, 5], [1, 2, 0, 1], ([9, 3, 3, 4], [5, 8, 5, 4]))
    assert report["accuracy"] == (1 + 0 + 0.5 + 1) / 4 and report["margin"] == 1.0
    assert report["accuracy_chosen_longer"] == 1.0 and report["pairs_chosen_longer"] == 1
    assert report["accuracy_chosen_shorter"] == 0.25 and report["pairs_chosen_shorter"] == 2
    assert report["ece"] is None  # far too few
    slope = np.polyfit([9, 3, 3, 4, 5, 8, 5, 4], [2, 1, 0, 5, 1, 2, 0, 1], 1)[0]
    assert report["length_slope"] == pytest.approx(100 * slope)


def test_an_overconfident_model_is_calibrated():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=4000)
    wins = generator.random(4000) < 1 / (1 + np.exp(-truth))
    chosen = np.where(wins, truth, -truth) * 4  # states four times the log-odds
    found = pair_report(chosen, np.zeros(4000), (np.ones(4000), np.ones(4000)))
    assert found["ece"] > 0.15 and found["ece_calibrated"] < 0.03
    right = pair_report(chosen / 4, np.zeros(4000), (np.ones(4000), np.ones(4000)))
    assert right["ece"] < 0.03 and right["length_slope"] is None


def test_no_pairs():
    with pytest.raises(InputError, match="pass one of each"):
        pair_report([], [], ([], []))
