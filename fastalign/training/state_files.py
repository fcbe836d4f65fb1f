"""Nested state, such as an optimiser's, as one JSON file and one safetensors file.

`torch.save` pickles, and to read a pickle can run any code that is in it. So state is written in two parts: tensors and
numpy arrays go into `<name>.safetensors`, and everything around them into `<name>.json`. JSON has only lists and
objects with strings as keys, so other things are written as an object with one key that starts with "$":

    {"$tensor": "3"}            the tensor "3" of the safetensors file
    {"$array": "3"}             the same as a numpy array
    {"$tuple": [...]}           a tuple
    {"$pairs": [[key, value]]}  a dictionary whose keys are not all strings
    {"$float": "nan"}           a float that JSON has no word for
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastalign.errors import ConfigError


def save_state(folder: Path, name: str, state: Any) -> None:
    """Writes nested state into `folder`, which is flushed to the disk later, as a whole.

    Each flush waits for all that the disk has to write, so one for each small file would cost more than the bytes.

    Args:
        folder: An existing folder.
        name: The name of both files, without their endings.
        state: Dictionaries, lists, tuples, numbers, strings, None, tensors and numpy arrays, nested in any way.

    Raises:
        ConfigError: The state holds an object of another kind.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_to_json(state, name, tensors), indent=1)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def load_state(folder: Path, name: str) -> Any:
    """What `save_state` wrote; None if there are no such files. Tensors are on the CPU."""
    path, tensors = folder / f"{name}.json", folder / f"{name}.safetensors"
    if not path.exists():
        return None
    return _from_json(json.loads(path.read_bytes()), load_file(tensors) if tensors.exists() else {})


def _to_json(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON has it. Its tensors are added to `tensors`."""
    if isinstance(value, Tensor):
        return {"$tensor": _add(value, tensors)}
    if isinstance(value, np.ndarray):
        return {"$array": _add(torch.from_numpy(value), tensors)}
    if isinstance(value, np.generic):
        return _to_json(value.item(), path, tensors)
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        pairs = [(key, _to_json(item, f"{path}.{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$pairs": [[_to_json(key, path, tensors), item] for key, item in pairs]}
    if isinstance(value, list | tuple):
        items = [_to_json(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise ConfigError(
        f"{path} is of type {type(value).__name__}, which a checkpoint cannot hold without a pickle: "
        "choose another optimiser or schedule, or set save_only_model=True"
    )


def _add(value: Tensor, tensors: dict[str, Tensor]) -> str:
    # A copy on the CPU: safetensors takes neither views of one storage nor what is not contiguous.
    name = str(len(tensors))
    tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    return name


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "$tensor":
            return tensors[content]
        if kind == "$array":
            return tensors[content].numpy()
        if kind == "$tuple":
            return tuple(_from_json(item, tensors) for item in content)
        if kind == "$pairs":
            return {_from_json(key, tensors): _from_json(item, tensors) for key, item in content}
        if kind == "$float":
            return float(content)
    return {key: _from_json(item, tensors) for key, item in value.items()}
