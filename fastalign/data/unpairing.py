"""Labelled rows from pairs, for the losses that take one completion with a label."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def labelled_from_pairs(pairs: pa.Table) -> pa.Table:
    """Two rows of each pair: the chosen completion with the label true, then the rejected one with the label false.

    Args:
        pairs: tokenised rows with two completions each, with the columns of `fastalign.data.token_table.SCHEMA`.

    Returns:
        Rows with one completion and `label`; both rows of a pair have its prompt.
    """
    both = pa.array(np.repeat(np.arange(len(pairs)), 2))  # (2 N,)
    columns = [
        pairs["prompt_ids"].combine_chunks().take(both),
        _one_each(pairs["completion_ids"].combine_chunks()),
        _one_each(pairs["completion_mask"].combine_chunks()),
        pa.array(np.tile([True, False], len(pairs))),
    ]
    return pa.table(columns, schema=pairs.schema)


def _one_each(column: pa.Array) -> pa.Array:
    """Lists of two items as twice as many lists of one item; null stays null."""
    if column.null_count:
        return pa.nulls(2 * len(column), column.type)
    items = column.flatten()
    return pa.ListArray.from_arrays(pa.array(np.arange(len(items) + 1, dtype=np.int32)), items)
