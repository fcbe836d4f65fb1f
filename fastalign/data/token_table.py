"""Tokenised rows as Arrow tables: from lists of token ids to a table, and lengths without making lists again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import InMemoryTable

from fastalign.data.encoding import Tokens

IDS, MASKS = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int8()))
SCHEMA = pa.schema(
    {"prompt_ids": IDS, "completion_ids": pa.list_(IDS), "completion_mask": MASKS, "label": pa.bool_()}
)  # fmt: skip


def table_of(rows: Sequence[tuple[Tokens, bool | None]], *, masked: bool) -> pa.Table:
    """A table of some tokenised rows with their labels.

    Args:
        rows: the rows.
        masked: whether a token is not scored. Otherwise the masks are null: `with_masks` writes them.
    """
    tokens = [row for row, _ in rows]
    masks = _nested([row.masks for row in tokens], np.int8) if masked else pa.nulls(len(rows), MASKS)
    columns = [
        _flat([row.prompt for row in tokens], np.int32), _nested([row.completions for row in tokens], np.int32), masks,
        pa.array([label for _, label in rows], pa.bool_()),
    ]  # fmt: skip
    return pa.table(columns, schema=SCHEMA)


def _flat(lists: list[list[int]], dtype: type) -> pa.Array:
    """Lists of numbers. They go through numpy, which takes a third of the time that Arrow takes."""
    values = np.fromiter(chain.from_iterable(lists), dtype, sum(map(len, lists)))
    return pa.ListArray.from_arrays(_offsets(lists), pa.array(values))


def _nested(lists: list[list[list[int]]], dtype: type) -> pa.Array:
    return pa.ListArray.from_arrays(_offsets(lists), _flat(list(chain.from_iterable(lists)), dtype))


def _offsets(lists: Sequence[Sized]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, lists)]).astype(np.int32))


def with_masks(table: pa.Table) -> pa.Table:
    """The table with masks of ones in place of masks that are null."""
    chunks = [_ones(batch) if batch["completion_mask"].null_count else batch for batch in table.to_batches()]
    return pa.Table.from_batches(chunks, table.schema)


def _ones(batch: pa.RecordBatch) -> pa.RecordBatch:
    completions = batch["completion_ids"]
    inner = completions.flatten()
    ones = pa.array(np.ones(len(inner.flatten()), np.int8))
    offsets = [pa.array(np.cumsum([0, *_lengths(lists)]).astype(np.int32)) for lists in (completions, inner)]
    masks = pa.ListArray.from_arrays(offsets[0], pa.ListArray.from_arrays(offsets[1], ones))
    return batch.set_column(batch.schema.get_field_index("completion_mask"), "completion_mask", masks)


def dataset_of(tables: Iterable[pa.Table], columns: list[str]) -> datasets.Dataset:
    """A data set in memory of some columns of tables, one after another."""
    return datasets.Dataset(InMemoryTable(pa.concat_tables(tables).select(columns)))


class TokenLengths(NamedTuple):
    """Lengths of N tokenised rows with C completions in all, as int64 arrays.

    Attributes:
        prompts: (N,) tokens of each prompt.
        completions: (C,) tokens of each completion, row by row.
        counts: (N,) completions of each row, at least 1.
    """

    prompts: np.ndarray
    completions: np.ndarray
    counts: np.ndarray

    def per_row(self, *, share_prompts: bool = True) -> np.ndarray:
        """(N,) tokens of each row: its prompt once, or once per completion, and all its completions."""
        prompts = self.prompts if share_prompts else self.prompts * self.counts
        return prompts + self._reduced(np.add)

    def longest(self) -> np.ndarray:
        """(N,) tokens of each row's prompt together with its longest completion."""
        return self.prompts + self._reduced(np.maximum)

    def with_prompt(self) -> np.ndarray:
        """(C,) tokens of each completion together with its prompt."""
        return np.repeat(self.prompts, self.counts) + self.completions

    def _reduced(self, operation: np.ufunc) -> np.ndarray:
        if not len(self.counts):
            return self.counts
        return operation.reduceat(self.completions, np.cumsum([0, *self.counts[:-1]]))


def lengths(rows: datasets.Dataset | Sequence[Mapping]) -> TokenLengths:
    """Lengths in tokens of tokenised rows.

    Those of a data set are read from its table as it lies there. To make Python's lists of all tokens would take
    minutes and gigabytes.
    """
    if not isinstance(rows, datasets.Dataset):
        completions = [len(ids) for row in rows for ids in row["completion_ids"]]
        parts = [[len(row["prompt_ids"]) for row in rows], completions, [len(row["completion_ids"]) for row in rows]]
        return TokenLengths(*(np.array(part, np.int64) for part in parts))
    prompts = map(_lengths, chunks(rows, "prompt_ids"))
    pairs = [(_lengths(chunk.flatten()), _lengths(chunk)) for chunk in chunks(rows, "completion_ids")]
    parts = [prompts, (completions for completions, _ in pairs), (counts for _, counts in pairs)]
    return TokenLengths(*(np.concatenate([np.zeros(0, np.int64), *part]) for part in parts))


def largest_token(rows: datasets.Dataset | Sequence[Mapping]) -> int:
    """The largest token id in some tokenised rows; 0 if there is none."""
    if not isinstance(rows, datasets.Dataset):
        return max(
            (token for row in rows for ids in (row["prompt_ids"], *row["completion_ids"]) for token in ids), default=0
        )
    values = [chunk.flatten() for chunk in chunks(rows, "prompt_ids")]
    values += [chunk.flatten().flatten() for chunk in chunks(rows, "completion_ids")]
    return max((pc.call_function("max", [part]).as_py() or 0 for part in values), default=0)


def chunks(tokens: datasets.Dataset, column: str, rows: int = 10_000) -> Iterator[pa.Array]:
    """A column as Arrow arrays of some thousand rows each."""
    tables: Any = tokens.select_columns([column]).with_format("arrow").iter(rows)
    for table in tables:
        yield from table.column(column).chunks


def scored(tokens: datasets.Dataset) -> int:
    """How many tokens of the completions have a mask of 1."""
    masks = (chunk.flatten().flatten() for chunk in chunks(tokens, "completion_mask"))
    return sum(int(pc.call_function("sum", [mask]).as_py() or 0) for mask in masks)


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.call_function("list_value_length", [lists]).to_numpy(zero_copy_only=False).astype(np.int64)


def with_values(tokens: datasets.Dataset, name: str, rows: Sequence[Sequence[np.ndarray]]) -> datasets.Dataset:
    """The data set with a column of float32 numbers: for each row, and each of its completions, an array of them."""
    tables = []
    for start in range(0, len(rows), 10_000):
        some = rows[start : start + 10_000]
        arrays = list(chain.from_iterable(some))
        values = pa.array(np.concatenate(arrays).astype(np.float32))
        inner = pa.ListArray.from_arrays(_offsets(arrays), values)
        tables.append(pa.table({name: pa.ListArray.from_arrays(_offsets(some), inner)}))
    return datasets.concatenate_datasets([tokens, dataset_of(tables, [name])], axis=1)
