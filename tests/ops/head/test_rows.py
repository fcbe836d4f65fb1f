"""Rows that are scored: found, gathered and scattered, also while a CUDA graph is captured."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import InputError
from fastalign.ops.head import rows
from fastalign.ops.head.rows import ScoredRows

TARGETS = torch.tensor([3, -100, 0, -100, 2])


def capture(monkeypatch):
    monkeypatch.setattr(rows, "is_capturing", lambda device: True)


def test_rows_with_a_target():
    scored, targets = rows.find_rows_with_target(TARGETS, -100, 4)
    assert scored.rows.tolist() == [0, 2, 4] and targets.tolist() == [3, 0, 2] and scored.ignored is None
    for ignore_index in (-7, None):
        scored, targets = rows.find_rows_with_target(TARGETS.clamp(min=0), ignore_index, 4)
        assert scored.rows is None and targets.tolist() == [3, 0, 0, 0, 2]


def test_while_a_graph_is_captured_all_rows_stay(monkeypatch):
    capture(monkeypatch)
    scored, targets = rows.find_rows_with_target(TARGETS, -100, 4)
    assert scored.rows is None and scored.ignored.tolist() == [False, True, False, True, False]
    assert targets.tolist() == [3, 0, 0, 0, 2]
    assert rows.find_unmasked_rows(TARGETS >= 0).ignored.equal(scored.ignored)


def test_a_target_outside_the_vocabulary_is_named():
    with pytest.raises(InputError, match=r"targets holds 3, but the vocabulary has 3 .* or ignore_index=-100"):
        rows.find_rows_with_target(TARGETS, -100, 3)


def test_rows_that_count():
    mask, weights = torch.tensor([True, True, False]), torch.tensor([0.0, 2.0, 1.0])
    assert rows.counting_mask(None, None) is None and rows.counting_mask(mask, None) is mask
    assert rows.counting_mask(None, weights).tolist() == [False, True, True]
    assert rows.counting_mask(mask, weights).tolist() == [False, True, False]
    assert rows.kept_rows(None) is None and rows.kept_rows(torch.ones(3, dtype=torch.bool)) is None
    assert rows.kept_rows(mask).tolist() == [0, 1]


@pytest.mark.parametrize(
    "scored",
    [
        ScoredRows(torch.tensor([0, 2, 4])),
        ScoredRows(None, torch.tensor([False, True, False, True, False])),
    ],
    ids=["dropped", "ignored"],
)
@pytest.mark.parametrize("width", [None, 3])
def test_scattering_undoes_gathering(width, scored):
    t = torch.arange(1.0, 6.0) if width is None else torch.arange(1.0, 16.0).view(5, 3)
    gathered = rows.gather_rows(t, scored)
    assert len(gathered) == 16
    counts = torch.tensor([True, False, True, False, True]).view(5, *[1] * (t.dim() - 1))
    assert torch.equal(rows.scatter_rows(gathered, scored, 5), t * counts)


def test_all_rows_come_back_without_their_padding():
    t = torch.randn(5, 2)
    gathered = rows.gather_rows(t, ScoredRows(None))
    assert torch.equal(rows.scatter_rows(gathered, ScoredRows(None), 5), t)
    whole = torch.randn(16, 2)
    assert rows.gather_rows(whole, ScoredRows(None)) is whole
