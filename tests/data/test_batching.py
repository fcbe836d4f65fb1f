"""Batches by a budget of tokens."""

from __future__ import annotations

from fastalign.data.batching import TOKENS_PER_BATCH, batch_rows, batches_within, token_count


def test_batches_fill_the_budget_and_keep_the_order():
    assert list(batches_within([4, 4, 2, 9, 1, 10, 3], int, 10)) == [[4, 4, 2], [9, 1], [10], [3]]


def test_what_is_longer_than_the_budget_is_alone():
    assert list(batches_within([2, 30, 2, 2], int, 10)) == [[2], [30], [2, 2]]
    assert list(batches_within([2, 3], int, 1)) == [[2], [3]]


def test_nothing_gives_no_batch():
    assert list(batches_within([], int)) == []


def test_a_prompt_counts_once():
    assert token_count({"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5], [6]]}) == 6


def test_rows_of_similar_length_share_a_batch():
    lengths = [900, 10, 1000, 20, 950, 3000]
    rows = [{"prompt_ids": [0] * (n - 1), "completion_ids": [[0]]} for n in lengths]
    assert list(batch_rows(rows, [0, 1, 2, 4, 5])) == [[1, 0, 4], [2], [5]]
    assert TOKENS_PER_BATCH == 2048
    assert list(batch_rows(rows, [3, 1, 0], 30)) == [[1, 3], [0]]
