"""Means of logged values and their noise, as the diagnostics compare them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, TypeGuard


def is_finite(value: Any) -> TypeGuard[int | float]:
    """Whether a logged value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def first_quarter(values: Sequence[float]) -> Sequence[float]:
    """The first quarter of the values, at least three."""
    return values[: max(3, len(values) // 4)]


def last_quarter(values: Sequence[float]) -> Sequence[float]:
    """The last quarter of the values, at least three."""
    return values[-max(3, len(values) // 4) :]


def noise_of(*groups: Sequence[float]) -> float:
    """Two standard errors of a difference of the groups' means."""
    return 2 * math.sqrt(sum(stdev(group) ** 2 / len(group) for group in groups if len(group) > 1))


def change_of(values: Sequence[float]) -> tuple[float, float]:
    """The mean of the last quarter minus that of the first, and its noise."""
    first, last = first_quarter(values), last_quarter(values)
    return fmean(last) - fmean(first), noise_of(first, last)
