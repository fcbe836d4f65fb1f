"""Rows into batches of at most so many tokens, for passes over a data set that need no gradient steps in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from fastalign.data.token_table import lengths

TOKENS_PER_BATCH = 2048

Item = TypeVar("Item")


def batches_within(
    items: Iterable[Item], length: Callable[[Item], int], tokens: int = TOKENS_PER_BATCH
) -> Iterator[list[Item]]:
    """Consecutive items in batches of at most `tokens` tokens. An item that is longer is a batch by itself.

    Args:
        items: what to batch; the order stays.
        length: the number of tokens of an item.
        tokens: the most tokens of a batch.

    Yields:
        Non-empty lists of items.
    """
    batch, total = [], 0
    for item in items:
        size = length(item)
        if batch and total + size > tokens:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


def token_count(row: Mapping[str, Any]) -> int:
    """Tokens of a tokenised row: its prompt once, and all its completions."""
    return len(row["prompt_ids"]) + sum(map(len, row["completion_ids"]))


def batch_rows(dataset, rows: Sequence[int], tokens: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """The numbers of some rows of a data set, in batches of at most `tokens` tokens.

    Rows of similar length share a batch, because a model that cannot take packed rows pads each batch to its longest.

    Args:
        dataset: tokenised rows, by number.
        rows: the numbers of the rows to batch.
        tokens: the most tokens of a batch; a longer row is a batch by itself.
    """
    sizes = lengths(dataset).per_row()
    in_order = np.asarray(rows, np.int64)[np.argsort(sizes[rows], kind="stable")]
    return batches_within(in_order.tolist(), sizes.tolist().__getitem__, tokens)
