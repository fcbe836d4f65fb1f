"""Numbers that go with a row through tokenisation, such as the margin of a pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import datasets

from fastalign.data.report import DataReport
from fastalign.errors import DataError

Tokenize = Callable[[datasets.Dataset], tuple[datasets.Dataset, DataReport]]


def with_numbers(
    rows: datasets.Dataset, tokenize: Tokenize, names: Sequence[str]
) -> tuple[datasets.Dataset, DataReport]:
    """Tokenised rows with columns of numbers, where the rows have such columns.

    Args:
        rows: The rows.
        tokenize: Tokenises rows, and may leave some out. Then it is called again with parts of the rows, to find which.
        names: The columns.

    Returns:
        The data set and its report; the columns are float64.

    Raises:
        DataError: A column holds something else than finite numbers, or the rows are of a layout that is converted.
    """
    tokens, report = tokenize(rows)
    names = [name for name in names if name in rows.column_names]
    if not names:
        return tokens, report
    if report.layout:
        raise DataError(
            f"The rows have the layout '{report.layout}', of which other rows are made, so the column {names[0]!r} "
            "belongs to none of them: convert the rows first, or remove it."
        )
    for name in names:
        _check(name, rows[name][:])
    kept = _kept(rows, list(range(len(rows))), len(tokens), tokenize)
    for name in names:
        values = rows[name][:]
        tokens = tokens.add_column(name, [float(values[i]) for i in kept])
    return tokens, report


def _check(name: str, values: list) -> None:
    for number, value in enumerate(values, start=1):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DataError(f"{name!r} is {value!r} in row {number}, where a finite number is needed: mend the row.")


def _kept(rows: datasets.Dataset, some: list[int], count: int, tokenize: Tokenize) -> list[int]:
    """Which of some rows are kept, of which `count` are: by halves, as long as a part keeps neither all nor none."""
    if count in (0, len(some)):
        return some if count else []
    half = some[: len(some) // 2], some[len(some) // 2 :]
    try:
        first = len(tokenize(rows.select(half[0]))[0])
    except DataError:  # none of them is left
        first = 0
    return _kept(rows, half[0], first, tokenize) + _kept(rows, half[1], count - first, tokenize)
