"""Chooses how a run fits into a memory limit, and says why the alternatives lost."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from fastalign.errors import ConfigError
from fastalign.memory.parts import Setting, parts
from fastalign.memory.shapes import Shapes

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Choice(NamedTuple):
    """One way to run: its setting, its peak in bytes, and its time per token relative to an unlimited run."""

    setting: Setting
    peak: int
    cost: float


def parse_size(name: str, text: object) -> int:
    """Bytes of a size such as 16GB (10^9 bytes) or 16GiB (2^30).

    Raises:
        ConfigError: The text is not a positive number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", str(text), re.IGNORECASE)
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or not float(match[1]):
        raise ConfigError(f"{name} is {text!r}; give a number above 0 with a unit, such as 16GB or 16GiB")
    return int(float(match[1]) * unit)


def peak(shapes: Shapes, setting: Setting) -> int:
    """The peak of a training step in bytes."""
    return sum(parts(shapes, setting).values())


def relative_cost(setting: Setting) -> float:
    """Time per token, where 1 is a step without checkpointing, of unquantised weights, over many tokens.

    It only orders the choices. A forward pass costs 1, a backward pass 2, or 1 where weights are frozen, so that
    checkpointing, which runs forward twice, adds 1/3 or 1/2. Weights are dequantised in every pass, which costs as much
    as 64 tokens; a micro-batch itself costs as much as 64 tokens on a CPU, and 256 on a GPU, which waits for launches.
    """
    forward_again = 1 / 2 if setting.rank else 1 / 3
    passes = 1 + forward_again * setting.checkpointing
    start = 64 if setting.device == "cpu" else 256
    fixed = start + 64 * (setting.quantization != "none")
    return passes * (1 + fixed / max(1, setting.tokens))


def alternatives(shapes: Shapes, setting: Setting, rows: int) -> list[Choice]:
    """Every way to run that computes the same loss: fewer rows per micro-batch, checkpointing, quantised weights.

    Quantisation is among them only with an adapter. It changes the frozen weights, all else keeps the results.

    Args:
        shapes: Those of the model.
        setting: That of the configuration, whose tokens belong to `rows` rows.
        rows: Rows of a micro-batch.

    Returns:
        The choices, the fastest first.
    """
    quantizations = ["none", "nf4"] if setting.rank and setting.quantization == "none" else [setting.quantization]
    counts = sorted({rows, *(2**i for i in range(rows.bit_length()) if 2**i < rows)}, reverse=True)
    found = []
    for count, checkpointing, quantization in itertools.product(counts, (False, True), quantizations):
        other = setting._replace(
            tokens=-(-setting.tokens * count // rows), checkpointing=checkpointing, quantization=quantization,
            accumulates=setting.accumulates or count < rows,
            double=setting.double or (quantization == "nf4" and setting.quantization == "none"),
        )  # fmt: skip
        found.append(Choice(other, peak(shapes, other), relative_cost(other)))
    return sorted(found, key=lambda choice: (choice.cost, choice.setting.quantization != "none", choice.peak))


def choose(choices: list[Choice], limit: int) -> Choice | None:
    """The fastest choice that fits; None if none does."""
    return next((choice for choice in choices if choice.peak <= limit), None)


def longest(shapes: Shapes, setting: Setting, limit: int) -> int:
    """The most tokens of one micro-batch that fit into `limit` bytes; 0 if not even one does."""
    low, high = 0, 1
    while high < 1 << 24 and peak(shapes, setting._replace(tokens=high)) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = peak(shapes, setting._replace(tokens=middle)) <= limit
        low, high = (middle, high) if fits else (low, middle)
    return low
