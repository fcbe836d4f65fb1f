"""What the suites share: cases by name, peers whose package may be missing, and random output layers."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from bench.harness.measure import Missing

Case = TypeVar("Case")


def by_name(cases: Iterable[Case]) -> dict[str, Case]:
    """Name -> case, in the given order: the form of every suite's `CASES` and `QUICK`."""
    return {case.name: case for case in cases}


def peer(module: str, function: Callable) -> Callable:
    """The function itself, if the module that it needs is installed.

    Raises:
        Missing: the module cannot be imported. The message says how to install it.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{error}; pip install 'fastalign[bench]'") from error
    return function


def draw_head(generator: torch.Generator, n: int, h: int, v: int) -> tuple[Tensor, Tensor]:
    """Random hidden states (n, h) and a random weight (v, h) in float32. The logits have standard deviation 3."""
    hidden = torch.randn(n, h, generator=generator)
    return hidden, torch.randn(v, h, generator=generator).mul_(3 / math.sqrt(h))
