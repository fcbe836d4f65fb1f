"""Keys of tokenised rows, under which computed log-probs are stored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset

KEY_BYTES = 16


TOKENS_PER_BATCH = 2048


def row_keys(row: dict) -> list[bytes]:
    """Of each completion of a tokenised row: a digest of its tokens, its prompt's and what of it is scored."""
    masks = row.get("completion_mask") or [None] * len(row["completion_ids"])
    keys = []
    for completion, mask in zip(row["completion_ids"], masks, strict=True):
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for part in (row["prompt_ids"], completion, mask or []):
            digest.update(np.asarray([len(part), *part], dtype=np.int64))
        keys.append(digest.digest())
    return keys


def by_tokens(dataset: Dataset, rows: list[int]) -> Iterator[list[int]]:
    """Rows of about the same length together, as many as fill a batch."""
    lengths = {i: len(dataset[i]["prompt_ids"]) + sum(map(len, dataset[i]["completion_ids"])) for i in rows}
    batch, tokens = [], 0
    for i in sorted(rows, key=lengths.__getitem__):
        if batch and tokens + lengths[i] > TOKENS_PER_BATCH:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Where what is computed once is kept: the folder given, or the user's cache."""
    if cache_dir:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastalign"
