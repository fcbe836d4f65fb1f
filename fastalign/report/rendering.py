"""What all pages share: the template environment, and how numbers and values are written."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def render(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file.

    Every value is escaped, because a model may have written it. The only exception is the filter `svg`, for drawings
    that fastalign made itself.

    Args:
        template: the file name of the template.
        values: the template's variables. A variable that the template uses and that is missing here is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": format_number, "text": format_text, "svg": Markup}
    return environment.get_template(template).render(values)


def text_table(rows: Sequence[Sequence[str]], *, left: Collection[int] = ()) -> str:
    """A table for the terminal, its first row the headings. Cells are data, never markup.

    Args:
        rows: the cells, as many in each row.
        left: the numbers of the columns that are aligned on the left; the others are aligned on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(
        [lines[0].rstrip(), "  ".join("-" * width for width in widths), *(line.rstrip() for line in lines[1:])]
    )


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is an int or a float. A bool, which Python counts as an int, is not a number here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_number(value: Any, sign: bool = False) -> str:
    """A number with three significant digits (integers in full) and commas between thousands.

    Args:
        value: what to write. None becomes a dash, and anything else that is not a number becomes text.
        sign: whether a positive number gets a plus sign.
    """
    if value is None:
        return DASH
    if not is_number(value):
        return format_text(value)
    if not isinstance(value, int) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
    size, plus = abs(value), "+" if sign and value > 0 else ""
    if isinstance(value, int):
        text = f"{size:,}"
    elif 1e-3 <= size < 1e7:
        text = f"{size:,.{max(0, 2 - math.floor(math.log10(size)))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = re.sub("e([+-])0?", r"e\1", f"{size:.3g}").replace("e+", "e").replace("-", MINUS)
    return f"{plus}{MINUS if value < 0 else ''}{text}"


def duration(seconds: float) -> str:
    """Seconds in words, such as "5 min 12 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def format_text(value: Any) -> str:
    """Any value of a run's files as text. A list of chat messages becomes "role: content" paragraphs."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "content" in item for item in value):
        return "\n\n".join(f"{item.get('role', '')}: {format_text(item['content'])}" for item in value)
    if isinstance(value, list):
        return ", ".join(format_text(item) for item in value)
    return "yes" if value is True else "no" if value is False else DASH if value is None else str(value)
