"""Log-probabilities under the reference: the weights in hand when training starts, never a reloaded copy.

Two ways to have them. `ReferenceWeights` keeps a copy of the trainable weights (a few megabytes of adapters, mostly)
and puts it in place for a forward pass. `precompute` runs the data set through the model once and keeps one number
per scored token, on disk, keyed by the token ids and the weights: a change of loss, beta or batch costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from fastalign.data.batching import batch_rows
from fastalign.data.keys import cache_folder, row_keys
from fastalign.data.packing import PackedBatch
from fastalign.errors import DataError
from fastalign.files import KeyedTensors, write_keyed

logger = logging.getLogger("fastalign")


def precompute(
    dataset: Dataset,
    score: Callable[[list[dict]], tuple[PackedBatch, Tensor]],
    weights: str,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """`dataset` with the column `ref_logprobs`: per row, a list of float32 token log-probs for each completion.

    score: takes examples, returns their batch and its (S,) log-probs. weights: the model's `fingerprint`, which names
    the cache file. Rows whose completions are all in the cache are not computed again.
    """
    path = cache_folder(cache_dir) / "ref_logprobs" / f"{weights}.safetensors"
    known = _read(path)
    keys = [row_keys(row) for row in dataset]
    missing = [i for i, own in enumerate(keys) if any(key not in known for key in own)]
    if missing:
        for rows in tqdm(list(batch_rows(dataset, missing)), desc="reference log-probs", unit="batch", leave=False):
            batch, logprobs = score([dataset[i] for i in rows])
            values = logprobs.float().cpu().numpy()
            bounds = batch.cu_seqlens.tolist()
            flat = [key for i in rows for key in keys[i]]
            for key, start, end in zip(flat, bounds[:-1], bounds[1:], strict=True):
                known[key] = values[start:end]
        write_keyed(path, list(known), {"logprobs": list(known.values())})
    column = [[known[key].tolist() for key in keys_of_row] for keys_of_row in keys]
    return dataset.add_column("ref_logprobs", column)


def _read(path: Path) -> dict[bytes, np.ndarray]:
    """The stored log-probs of every completion, by key; none where there is no file that can be read."""
    if not path.exists():
        return {}
    try:
        return KeyedTensors(path, ["logprobs"]).read_all("logprobs")
    except DataError as error:  # a damaged cache is no reason to stop: it is computed again
        logger.warning("The reference cache is computed again: %s.", error)
        return {}
