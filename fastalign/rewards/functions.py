"""Reward functions in TRL's form, loaded by name, called, and checked."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.errors import ConfigError, TrainingError
from fastalign.rewards.model import RewardModel

RewardFunction = Callable[..., Any]


def load_reward(source: str) -> RewardFunction:
    """A reward function by its name.

    Args:
        source: `module:function`, `path:function` of a Python file, or the folder of a reward model. The module or file
            is imported, that is, its code is run.

    Raises:
        ConfigError: There is no such module, file or function.
        ModelError: The folder holds no reward model.
    """
    place, _, name = source.rpartition(":")
    if not place:
        return RewardModel.load(source)
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, OSError) as error:
        raise ConfigError(f"reward_funcs names {source!r}, and {place} cannot be imported: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"reward_funcs names {source!r}, but {place} has no function {name!r}")
    return function


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path.expanduser())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rewards:
    """Several reward functions with a weight each.

    Args:
        functions: Called as `function(prompts=..., completions=..., **columns)`. Each returns one number per
            completion, or None for one that it cannot score.
        weights: One per function; None: 1 each.

    Raises:
        ConfigError: There is no function, or there are not as many weights.
    """

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] | None = None):
        if not functions:
            raise ConfigError("reward_funcs is empty; name at least one reward")
        self.functions, self.weights = list(functions), [1.0] * len(functions) if weights is None else list(weights)
        if len(self.weights) != len(functions) or not all(map(math.isfinite, self.weights)):
            raise ConfigError(
                f"reward_weights is {self.weights} for {len(functions)} rewards; give one finite number for each"
            )
        names = [getattr(function, "__name__", type(function).__name__) for function in functions]
        self.names = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Tensor:
        """The rewards of each completion by each function.

        Returns:
            (N, functions) float32 on the CPU, NaN where a function gave None.

        Raises:
            TrainingError: A function raised, or returned another length, NaN, infinity, something that is no number,
                or None for every completion.
        """
        found = []
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                values = function(prompts=prompts, completions=completions, **columns)
            except Exception as error:
                said = " ".join(str(error).split())[:200]
                raise TrainingError(f"The reward {name} raised {type(error).__name__}: {said}") from error
            found.append(_checked(name, values, len(completions)))
        return torch.stack(found, 1)

    def total(self, rewards: Tensor) -> Tensor:
        """(N,) the weighted sum; a reward that is missing counts as 0, and an answer without any is NaN."""
        weights = torch.tensor(self.weights, dtype=rewards.dtype)
        total = (rewards.nan_to_num(nan=0.0) * weights).sum(1)
        return total.masked_fill(rewards.isnan().all(1), torch.nan)


def _checked(name: str, values: Any, count: int) -> Tensor:
    values = values.detach().flatten().tolist() if isinstance(values, Tensor) else values
    if not isinstance(values, Sequence) or len(values) != count:
        size = f"{len(values)} values" if hasattr(values, "__len__") else f"a {type(values).__name__}"
        raise TrainingError(f"The reward {name} returned {size} for {count} completions; return one number for each")
    for i, value in enumerate(values):
        number = None if value is None else _number(value)
        if value is not None and (number is None or not math.isfinite(number)):
            raise TrainingError(
                f"The reward {name} gave {value!r} for completion {i}; return a finite number, or None where it cannot "
                "be scored"
            )
    if all(value is None for value in values):
        raise TrainingError(f"The reward {name} gave None for all {count} completions: none of them can be scored")
    return torch.tensor([math.nan if value is None else float(value) for value in values])


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
