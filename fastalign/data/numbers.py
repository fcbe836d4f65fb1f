"""Numbers that go with a row through tokenisation, such as the margin of a pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fastalign.data.messages import RowProblem


def with_numbers(row: dict, read: Callable[[dict], Any], names: Sequence[str]) -> Any:
    """What `read` makes of a row whose columns of these names hold finite numbers.

    Args:
        row: a row of the data set.
        read: makes an example of a row.
        names: the columns.

    Raises:
        RowProblem: a column holds something else.
    """
    for name in names:
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RowProblem("no number", f"{name!r} is {value!r}, where a finite number is needed")
    return read(row)


def numbers_of(batch: tuple[int, dict[str, list]], number: int, names: Sequence[str]) -> dict[str, float]:
    """The numbers of one row.

    Args:
        batch: how many rows are before it, and its columns.
        number: of the row, counted from 1.
        names: the columns of the numbers.
    """
    before, columns = batch
    return {name: columns[name][number - before - 1] for name in names}
