"""Where values that are computed once per completion are cached, and under which keys."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Collection, Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.files import KEY_BYTES

_ROWS_AT_A_TIME = 10_000


def row_keys(row: dict) -> list[bytes]:
    """The key of each completion of a tokenised row, under which a value computed from it is stored.

    A key is a digest of the tokens of the prompt, the tokens of the completion, and its mask. It does not depend on
    options such as the loss or beta, so a cached log-prob stays valid when they change.

    Args:
        row: `prompt_ids`, `completion_ids` (one list for each completion) and perhaps `completion_mask`.

    Returns:
        `KEY_BYTES` bytes for each completion.
    """
    masks = row.get("completion_mask") or [None] * len(row["completion_ids"])
    keys = []
    for completion, mask in zip(row["completion_ids"], masks, strict=True):
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        # Each part starts with its length: otherwise a token could move from the prompt to the completion unnoticed.
        for part in (row["prompt_ids"], completion, mask or []):
            digest.update(np.asarray([len(part), *part], dtype=np.int64).tobytes())
        keys.append(digest.digest())
    return keys


def rows_fingerprint(dataset: Any, leave_out: Collection[str] = ()) -> str:
    """A digest of the rows of a data set, in their order.

    It depends on the values alone: not on where they lie, in how many pieces, nor on how they were made.

    Args:
        dataset: A `datasets.Dataset`, for example of tokenised rows.
        leave_out: Columns that do not count.
    """
    digest = hashlib.sha256()
    names = sorted(set(dataset.column_names) - set(leave_out))
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for name in names:
            digest.update(name.encode())
            _add_array(digest, table.column(name).combine_chunks())
    return digest.hexdigest()


def _add_array(digest: Any, array: Any) -> None:
    """Adds the values of an Arrow array: numbers as bytes, lists as their lengths and their values."""
    import pyarrow as pa

    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    plain = array.null_count == 0
    if plain and (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        digest.update(array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
        _add_array(digest, array.flatten())
    elif plain and (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        values = array.to_numpy(zero_copy_only=False)
        digest.update(values.astype(np.int64 if values.dtype.kind in "iu" else np.float64).tobytes())
    else:
        digest.update(repr(array.to_pylist()).encode())


def dataset_keys(tokens: Any) -> list[list[bytes]]:
    """The `row_keys` of each row of a tokenised data set, without lists of all its tokens."""
    names = ("prompt_ids", "completion_ids", "completion_mask")
    columns = [name for name in names if name in tokens.column_names]
    keys: list[list[bytes]] = []
    tables: Any = tokens.select_columns(columns).with_format("arrow").iter(_ROWS_AT_A_TIME)
    for table in tables:
        batch = table.combine_chunks()
        prompts, completions, *masks = (batch.column(name).combine_chunks() for name in columns)
        if masks and 0 < masks[0].null_count < len(batch):  # some rows with a mask, and some without
            keys += [row_keys(row) for row in batch.to_pylist()]
            continue
        owners = np.diff(completions.offsets.to_numpy()).tolist()
        of_completions, of_masks = _parts(completions.flatten()), repeat(b"\0" * 8)
        if masks and not masks[0].null_count:
            of_masks = _parts(masks[0].flatten())
        for prompt, count in zip(_parts(prompts), owners, strict=True):
            row = zip(islice(of_completions, count), of_masks, strict=False)
            keys.append([_digest(prompt, completion, mask) for completion, mask in row])
    return keys


def _parts(lists: Any) -> Iterator[bytes]:
    """Each list of numbers as int64, with its length in front."""
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(np.diff(lists.offsets.to_numpy())).tolist()
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield (end - start).to_bytes(8, sys.byteorder) + values[start:end].tobytes()


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=KEY_BYTES).digest()


def cache_folder(cache_dir: str | Path | None) -> Path:
    """The folder for values that are computed once: the one given, or `fastalign` in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastalign"
