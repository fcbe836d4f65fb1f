"""Agreement: Krippendorff's worked example, and annotators whose quality is known."""

from __future__ import annotations

import numpy as np
import pytest

from fastalign.errors import InputError
from fastalign.stats import dawid_skene, krippendorff_alpha

NONE = float("nan")
# Krippendorff 2011, section C: four observers, twelve units.
EXAMPLE = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]


@pytest.mark.parametrize("level,expected", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorff_s_own_example(level, expected):
    assert krippendorff_alpha(EXAMPLE, level) == pytest.approx(expected, abs=5e-4)


def test_chance_gives_zero_and_agreement_one():
    rng = np.random.default_rng(0)
    assert krippendorff_alpha(rng.integers(0, 3, (4, 4000))) == pytest.approx(0, abs=0.02)
    assert krippendorff_alpha([[0, 1, 2], [0, 1, 2]]) == 1.0
    assert krippendorff_alpha([[0, 1, 0, 1], [1, 0, 1, 0]]) < 0


def annotators(accuracies, items=400, classes=3, seed=1):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, items)
    labels = np.stack([np.where(rng.random(items) < p, truth, rng.integers(0, classes, items)) for p in accuracies])
    return truth, labels.astype(float)


def test_dawid_and_skene_weigh_annotators_by_their_quality():
    truth, labels = annotators([0.9, 0.85, 0.05, 0.05, 0.05])
    vote = np.array([np.bincount(column.astype(int), minlength=3).argmax() for column in labels.T])
    found = dawid_skene(labels)
    right = np.mean(found.probabilities.argmax(1) == truth)
    assert right > np.mean(vote == truth) + 0.1 and right > 0.9
    np.testing.assert_allclose(found.probabilities.sum(1), 1)
    np.testing.assert_allclose(found.confusion.sum(2), 1)
    assert np.diag(found.confusion[0]).min() > 0.85 > 0.6 > np.diag(found.confusion[3]).mean()


def test_an_annotator_who_swaps_two_classes_is_read_backwards():
    truth, labels = annotators([0.95, 0.95, 0.95], classes=2)
    labels[2] = 1 - labels[2]
    assert np.mean(dawid_skene(labels).probabilities.argmax(1) == truth) > 0.95


def test_missing_labels_do_not_count():
    truth, labels = annotators([0.9] * 5)
    labels[np.random.default_rng(2).random(labels.shape) < 0.4] = NONE
    labels = labels[:, ~np.isnan(labels).all(0)]
    np.testing.assert_allclose(
        dawid_skene(labels).probabilities, dawid_skene(np.nan_to_num(labels, nan=-1)).probabilities
    )
    assert len(truth) >= labels.shape[1]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: krippendorff_alpha([[1, NONE], [NONE, 2]]), "No item has two ratings"),
        (lambda: krippendorff_alpha([[1, 1], [1, 1]]), "All ratings are 1"),
        (lambda: krippendorff_alpha([1, 2]), r"shape \(2,\); expected \(annotators, items\)"),
        (lambda: krippendorff_alpha(EXAMPLE, "ratio"), "level is 'ratio'; expected one of nominal"),
        (lambda: dawid_skene([[0, 1], [NONE, NONE]][1:]), "2 items have no label"),
        (lambda: dawid_skene([[0.5, 1]]), "no whole numbers"),
        (lambda: dawid_skene([[0, 0]]), "with one class there is nothing to find"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
