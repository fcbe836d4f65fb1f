"""Checks that the functions of this package share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastalign.errors import InputError


def numbers(name: str, values: ArrayLike, *, ndim: int = 1, least: int = 1) -> np.ndarray:
    """The values as a float64 array.

    Raises:
        InputError: They are no finite numbers, have another number of dimensions, or are fewer than `least`.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} holds values that are no numbers ({error}); pass an array of numbers") from error
    if array.ndim != ndim:
        raise InputError(f"{name} has the shape {array.shape}; expected {ndim} dimension{'s' * (ndim > 1)}")
    if len(array) < least:
        raise InputError(f"{name} has {len(array)} value{'s' * (len(array) != 1)}; at least {least} are needed")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds {np.count_nonzero(~np.isfinite(array))} NaN or infinite values; leave them out")
    return array


def same_length(**arrays: np.ndarray) -> None:
    """InputError unless the arrays, named by their keywords, are equally long."""
    if len({len(array) for array in arrays.values()}) > 1:
        found = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise InputError(f"The lengths differ ({found}); pass one value per item in each")


def share(name: str, value: Any) -> float:
    """The value as a number strictly between 0 and 1, else InputError."""
    if not (isinstance(value, (int, float)) and 0 < value < 1):
        raise InputError(f"{name} is {value!r}; expected a number between 0 and 1, without the two")
    return float(value)


def outcomes(name: str, values: ArrayLike) -> np.ndarray:
    """The values, each 0 or 1, as a float64 array; InputError for others."""
    array = numbers(name, values)
    if not np.isin(array, (0, 1)).all():
        other = array[~np.isin(array, (0, 1))][0]
        raise InputError(f"{name} holds {other:g}; expected 0 or 1 (false or true) for each item")
    return array
