"""Labelled rows from pairs, for the losses that take one completion with a label."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable


def labelled_from_pairs(pairs: datasets.Dataset) -> datasets.Dataset:
    """Two rows of each pair: the chosen completion with the label true, then the rejected one with the label false.

    Args:
        pairs: tokenised rows with two completions each.

    Returns:
        Rows with one completion and `label`; both rows of a pair have its prompt.
    """
    table = pairs.data.table.combine_chunks()
    names = [name for name in ("prompt_ids", "completion_ids", "completion_mask") if name in table.column_names]
    both = np.repeat(np.arange(len(pairs)), 2)  # (2 N,)
    columns = {}
    for name in names:
        column = table.column(name).combine_chunks()
        columns[name] = column.take(pa.array(both)) if name == "prompt_ids" else _one_each(column)
    columns["label"] = pa.array(np.tile([True, False], len(pairs)))
    return datasets.Dataset(InMemoryTable(pa.table(columns)))


def _one_each(column: pa.Array) -> pa.Array:
    """Lists of two items as twice as many lists of one item."""
    items = column.flatten()
    return pa.ListArray.from_arrays(pa.array(np.arange(len(items) + 1, dtype=np.int32)), items)
