"""Where values that are computed once per completion are cached, and under which keys."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from fastalign.files import KEY_BYTES


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


def cache_folder(cache_dir: str | Path | None) -> Path:
    """The folder for values that are computed once: the one given, or `fastalign` in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastalign"
