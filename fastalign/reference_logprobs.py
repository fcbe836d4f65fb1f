"""Log-probabilities under the reference: the weights in hand when training starts, never a reloaded copy.

Two ways to have them. `ReferenceWeights` keeps a copy of the trainable weights (a few megabytes of adapters, mostly)
and puts it in place for a forward pass. `precompute` runs the data set through the model once and keeps one number
per scored token, on disk, keyed by the token ids and the weights: a change of loss, beta or batch costs nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastalign.packing import PackedBatch

logger = logging.getLogger("fastalign")

_FORMAT = "1"  # part of every key: a change of what is stored makes old files unread
_KEY_BYTES = 16
_TOKENS_PER_BATCH = 2048


class ReferenceWeights:
    """A copy of a model's trainable weights, to be put in place while the reference is asked."""

    def __init__(self, model: nn.Module):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the reference's weights inside; use it under `torch.no_grad`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.values[i] = self.values[i], parameter.data

    def move_towards_model(self, share: float) -> None:
        """`reference = share * model + (1 - share) * reference` (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656)."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            value.lerp_(parameter.data, share)


def fingerprint(model: nn.Module, precision: str = "") -> str:
    """A hash of everything that the model computes with: configuration, weights, and the precision of its products.

    Fresh LoRA adapters (B = 0) change nothing and are left out: their random A differs from run to run.
    """
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    lora = {name: value for name, value in state.items() if "lora_" in name}
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "scaling", None), dict)]
    scales = [(sorted(layer.scaling.items()), layer.active_adapters, layer.disable_adapters) for layer in layers]
    # An adapter on embeddings starts with A = 0 instead: rare enough to be hashed as it is.
    if not any("lora_embedding" in name or ("lora_B" in name and value.any()) for name, value in lora.items()):
        state = {name: value for name, value in state.items() if name not in lora}
        scales = []
    config = model.config.to_dict()
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"):
        config.pop(name, None)
    heading = f"{_FORMAT} {precision} {sorted(config.items(), key=str)} {scales}"
    digest = hashlib.blake2b(heading.encode(), digest_size=_KEY_BYTES)
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        # the same model with and without an adapter around it has the same names
        plain = name.replace("base_model.model.", "").replace(".base_layer", "")
        digest.update(f"{plain} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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


def row_keys(row: dict) -> list[bytes]:
    """Of each completion of a tokenised row: a digest of its tokens, its prompt's and what of it is scored."""
    masks = row.get("completion_mask") or [None] * len(row["completion_ids"])
    keys = []
    for completion, mask in zip(row["completion_ids"], masks, strict=True):
        digest = hashlib.blake2b(digest_size=_KEY_BYTES)
        for part in (row["prompt_ids"], completion, mask or []):
            digest.update(np.asarray([len(part), *part], dtype=np.int64))
        keys.append(digest.digest())
    return keys


def by_tokens(dataset: Dataset, rows: list[int]) -> Iterator[list[int]]:
    """Rows of about the same length together, as many as fill a batch."""
    lengths = {i: len(dataset[i]["prompt_ids"]) + sum(map(len, dataset[i]["completion_ids"])) for i in rows}
    batch, tokens = [], 0
    for i in sorted(rows, key=lengths.__getitem__):
        if batch and tokens + lengths[i] > _TOKENS_PER_BATCH:
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


def _read(path: Path) -> dict[bytes, np.ndarray]:
    if not path.exists():
        return {}
    try:
        tensors = load_file(path)
        keys, offsets, logprobs = tensors["keys"], tensors["offsets"], tensors["logprobs"]
        if keys.shape[1:] != (_KEY_BYTES,) or len(offsets) != len(keys) + 1 or offsets[-1] != len(logprobs):
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
        "keys": np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, _KEY_BYTES).copy(),
        "offsets": np.cumsum([0, *map(len, values)]).astype(np.int64),
        "logprobs": np.concatenate(values).astype(np.float32),
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    save_file(tensors, temporary)
    os.replace(temporary, path)
