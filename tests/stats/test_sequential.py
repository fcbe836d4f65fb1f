"""Tests that are looked at after every sample: their error rates, counted."""

from __future__ import annotations

import numpy as np
import pytest

from fastalign.errors import InputError
from fastalign.stats import confidence_sequence, e_benjamini_hochberg, e_process

STREAMS, LENGTH = 400, 1000


def streams(mean: float, seed: int = 0):
    return (np.random.default_rng(seed).random((STREAMS, LENGTH)) < mean).astype(float)


@pytest.mark.parametrize("mean", [0.5, 0.1])
def test_a_confidence_sequence_covers_at_every_look(mean):
    missed = []
    for values in streams(mean):
        low, high = confidence_sequence(values)
        missed.append(((low > mean) | (high < mean)).any())
    assert np.mean(missed) <= 0.05


def test_it_narrows_with_the_variance():
    low, high = confidence_sequence(streams(0.5)[0])
    assert high[-1] - low[-1] < 0.16  # Hoeffding's fixed interval for one look has 0.086
    low, high = confidence_sequence(0.5 + 0.01 * (streams(0.5)[0] - 0.5))
    assert high[-1] - low[-1] < 0.03
    assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all()


def test_bounds_scale():
    values = streams(0.3)[1]
    low, high = confidence_sequence(values)
    wide = confidence_sequence(4 * values - 1, low=-1, high=3)
    np.testing.assert_allclose(wide, (4 * low - 1, 4 * high - 1))


def test_evidence_seldom_reaches_twenty_without_a_change_and_does_with_one():
    alarms = np.mean([(e_process(values, 0.5) >= 20).any() for values in streams(0.5)])
    assert alarms <= 0.05
    assert np.mean([(e_process(values, 0.5) >= 20).any() for values in streams(0.4)]) <= alarms
    assert np.mean([(e_process(values, 0.5) >= 20).any() for values in streams(0.6, seed=1)]) >= 0.95


def test_a_test_at_every_look_would_be_wrong_far_more_often():
    """What the e-process is for."""
    values = streams(0.5)
    t = np.arange(1, LENGTH + 1)
    z = (np.cumsum(values, 1) - t / 2) / np.sqrt(t / 4)
    assert np.mean((z[:, 20:] > 1.645).any(1)) > 0.25


def test_a_bet_depends_on_the_past_alone():
    """The evidence up to a moment does not change with what comes later, and its mean is 1 without a change."""
    values = streams(0.5)
    np.testing.assert_array_equal(e_process(values[0], 0.5)[:50], e_process(values[0, :50], 0.5))
    assert np.mean([e_process(v, 0.5)[9] for v in streams(0.5, seed=2)]) == pytest.approx(1, abs=0.15)


def test_e_benjamini_hochberg():
    assert e_benjamini_hochberg([100, 1, 50, 0.5], 0.05).tolist() == [True, False, True, False]
    assert e_benjamini_hochberg([39, 1, 39, 0.5], 0.05).tolist() == [False] * 4  # 39 * 2 < 4 / 0.05
    assert e_benjamini_hochberg([40, 1, 40, 0.5], 0.05).tolist() == [True, False, True, False]


def test_the_false_discovery_rate_holds_for_dependent_hypotheses():
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(1000):
        z = 0.8 * rng.normal() + 0.6 * rng.normal(size=20)  # dependent, standard normal each
        z[:5] += 3
        rejected = e_benjamini_hochberg(np.exp(2 * z - 2), 0.1)
        shares.append(rejected[5:].sum() / max(1, rejected.sum()))
    assert np.mean(shares) <= 0.1


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: confidence_sequence([0.5, 1.5]), r"from 0.5 to 1.5, outside of \[0.0, 1.0\]: widen"),
        (lambda: confidence_sequence([0.5], low=1, high=1), "expected low < high"),
        (lambda: e_process([0.5], 1.0), "null_mean is 1.0"),
        (lambda: e_benjamini_hochberg([-1.0]), "e-values are at least 0"),
        (lambda: e_benjamini_hochberg([1.0], 5), "rate is 5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
