"""Which folder of a run holds its model: commands take a run folder, a model folder or a name alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastalign.errors import ModelError
from fastalign.models.adapters import adapter_base
from fastalign.models.loading import load_model, load_tokenizer, load_with_adapter

_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


def model_folder(source: str | Path) -> str | Path:
    """The folder of the model that a run left; a source that is no run folder is returned as it is.

    - A run that trained an adapter has it in the run folder itself.
    - A run that trained all weights has them in `model`.
    - A run that was stopped has neither: its newest checkpoint is taken.

    Args:
        source: a run folder, or anything that `load_model` takes.

    Raises:
        ModelError: the run has left no model yet.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() or _has_weights(folder):
        return source
    if _has_weights(folder / "model"):
        return folder / "model"
    if not (folder / "run.json").is_file():
        return source
    saved = [(checkpoint_step(path), path) for path in folder.glob("checkpoint-*") if _has_weights(path)]
    if not saved:
        raise ModelError(
            f"The run {source} has left no model: it has not finished, and it holds no checkpoint. "
            "Go on with the run, or set save_steps so that it saves sooner."
        )
    return max(saved)[1]


def checkpoint_step(path: Path) -> int:
    """The optimiser step of a checkpoint folder; -1 if its name has no number."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)


def load_run(
    source: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model of a run or of any other source, on its device, and its tokenizer.

    An adapter stays beside the weights: merged into weights of 16 bits it would be rounded with them.

    Args:
        source: a run folder, or anything that `load_model` takes.
        dtype: of the weights, see `load_model`.
        device: None: the GPU if there is one.

    Raises:
        ModelError: the model or its tokenizer cannot be loaded.
    """
    folder = model_folder(source)
    tokenizer = load_tokenizer(folder)
    load = load_model if adapter_base(folder) is None else load_with_adapter
    model: Any = load(folder, dtype=dtype)  # transformers' own annotations of `to` are wrong
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), tokenizer
