"""Log-probabilities under the reference: the weights in hand when training starts, never a reloaded copy.

Two ways to have them. `ReferenceWeights` keeps a copy of the trainable weights (a few megabytes of adapters, mostly)
and puts it in place for a forward pass. `precompute` runs the data set through the model once and keeps one number
per scored token, on disk, keyed by the token ids and the weights: a change of loss, beta or batch costs nothing.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from fastalign.data.keys import KEY_BYTES, by_tokens, cache_folder, row_keys
from fastalign.data.packing import PackedBatch

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
        for rows in tqdm(list(by_tokens(dataset, missing)), desc="reference log-probs", unit="batch", leave=False):
            batch, logprobs = score([dataset[i] for i in rows])
            values = logprobs.float().cpu().numpy()
            bounds = batch.cu_seqlens.tolist()
            flat = [key for i in rows for key in keys[i]]
            for key, start, end in zip(flat, bounds[:-1], bounds[1:], strict=True):
                known[key] = values[start:end]
        _write(path, known)
    column = [[known[key].tolist() for key in keys_of_row] for keys_of_row in keys]
    return dataset.add_column("ref_logprobs", column)


def _read(path: Path) -> dict[bytes, np.ndarray]:
    if not path.exists():
        return {}
    try:
        tensors = load_file(path)
        keys, offsets, logprobs = tensors["keys"], tensors["offsets"], tensors["logprobs"]
        if keys.shape[1:] != (KEY_BYTES,) or len(offsets) != len(keys) + 1 or offsets[-1] != len(logprobs):
            raise ValueError("its tensors do not fit together")
    except Exception as error:  # a damaged cache is no reason to stop: it is computed again
        logger.warning("The reference cache %s cannot be read (%s); it is computed again.", path, error)
        return {}
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return {key.tobytes(): logprobs[start:end] for key, (start, end) in zip(keys, bounds, strict=True)}


def _write(path: Path, known: dict[bytes, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = list(known.values())
    tensors = {
        "keys": np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, KEY_BYTES).copy(),
        "offsets": np.cumsum([0, *map(len, values)]).astype(np.int64),
        "logprobs": np.concatenate(values).astype(np.float32),
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    save_file(tensors, temporary)
    os.replace(temporary, path)
