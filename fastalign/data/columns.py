"""Which columns of a data set are read, and as what: aliases of columns, and columns that change what a row means."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any

import datasets

from fastalign.data.messages import WEIGHTS, RowProblem
from fastalign.errors import DataError

# Names that people give to a field, the best one first. Upper and lower case do not matter.
ALIASES = {
    "prompt": ("prompt", "instruction", "question", "query", "input", "problem", "user", "human", "conversations"),
    "completion": ("completion", "response", "output", "solution", "answer", "assistant"),
    "chosen": ("chosen", "chosen_response", "preferred"),
    "rejected": ("rejected", "rejected_response", "dispreferred"),
    "label": ("label", "kto_tag"),
    "messages": ("messages", "conversations", "conversation"),
    "completions": ("completions", "responses", "answers", "candidates", "outputs", "generations"),
    "scores": ("scores", "ratings", "rewards"),
    "ranks": ("ranks", "ranking", "rankings", "rank"),
    "ranked": ("ranked_completions", "ranked_responses", "ranked_answers"),
    "turns": ("turns", "dialog", "dialogue", "data", "conversation"),
    "system": ("system", "system_prompt"),
    "context": ("input", "context"),
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
# Pairs of columns that hold the scores of the two answers.
SCORES = tuple(
    (pattern.format("chosen"), pattern.format("rejected"))
    for pattern in ("score_{}", "{}_score", "{}_rating", "rating_{}", "{}_reward", "reward_{}")
)
# Fields that a format reads where the column is there.
OPTIONAL = ("system", "context", "tools", "chat_template_kwargs")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def column_of(field: str, names: Collection[str]) -> str | None:
    """The column that holds a field: the first of the field's names that is there, in upper or lower case."""
    lowered = {name.lower(): name for name in reversed([*names])}
    aliases = ALIASES.get(field, (field,))
    return next((name if name in names else lowered[name.lower()] for name in aliases if name.lower() in lowered), None)


def sources(columns: tuple[str, ...], filled: Mapping[str, object]) -> dict[str, str] | None:
    """From the fields of a format, and the optional ones, to the columns that hold them.

    Args:
        columns: the fields that the format needs.
        filled: the columns of the data set that hold a value.

    Returns:
        None if a needed field has no column.
    """
    found: dict[str, str] = {}
    for field in columns:
        name = column_of(field, filled)
        if name is None or name in found.values():
            return None
        found[field] = name
    if columns == ("text",):
        return found
    return found | optional_columns(found, filled)


def optional_columns(found: Mapping[str, str], filled: Collection[str]) -> dict[str, str]:
    """From the optional fields that are not among `found` to the columns that hold them."""
    more: dict[str, str] = {}
    for field in OPTIONAL:
        used = {*found.values(), *more.values()}
        name = column_of(field, [name for name in filled if name not in used])
        # Text beside an instruction belongs to it. Beside a column that is called prompt it may be anything.
        beside_instruction = found.get("prompt", "").lower() in ("instruction", "question", "query")
        if name and field not in found and (field != "context" or beside_instruction):
            more[field] = name
    return more


def unread_columns(rows: datasets.Dataset, read: Mapping[str, str]) -> list[str]:
    """The columns that hold something and are not read. A number may mean as much as a text: a rating, or a winner."""
    names = [name for name in rows.column_names if name not in read.values()]
    return [name for name in names if first_filled(rows, name) is not None]


def lower_scores(rows: datasets.Dataset) -> int:
    """How many pairs have a chosen answer with a lower score than the rejected one, by columns of the data set."""
    for names in SCORES:
        chosen, rejected = (column_of(name, rows.column_names) for name in names)
        if chosen is None or rejected is None:
            continue
        return sum(
            _number(low) < _number(high) for low, high in zip(_cells(rows, chosen), _cells(rows, rejected), strict=True)
        )
    return 0


def _number(cell: Any) -> float:
    """A cell as a number; NaN, which is below no number, if it is none. The cells of a CSV file are strings."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def refuse_changed_meaning(rows: datasets.Dataset, fields: Mapping[str, str]) -> None:
    """Refuses columns that would have to change the training of a row, but do not.

    Raises:
        DataError: such a column holds a value.
    """
    for name in rows.column_names:
        if name in fields.values():
            continue
        if name in MEDIA and first_filled(rows, name) is not None:
            raise DataError(
                f"The column {name!r} holds values: only text is trained on. Remove the column to train on the text."
            )
        # Beside other fields a label may be the class of a text, which is not read.
        if (
            name.lower() in ALIASES["label"]
            and {"messages", "history"} & {*fields}
            and first_filled(rows, name) is not None
        ):
            raise DataError(
                f"The column {name!r} would not be used here: give 'prompt', 'completion' and 'label' for labelled "
                "rows, or remove the column."
            )
        if name in WEIGHTS:
            other = next((value for value in _cells(rows, name) if value is not None and value not in (1, "")), None)
            if other is not None:
                raise DataError(
                    f"The column {name!r} holds {other!r:.40}: rows are not weighted. Leave out rows that shall not "
                    "count, or remove the column."
                )
    if {"text"} == set(fields) and {"role", "parent_id"} & set(rows.column_names):
        raise DataError(
            "The rows hold one message per row ('text' beside 'role' or 'parent_id'), a flat export of conversations. "
            "Join the messages of each conversation into one row with 'messages'."
        )


def first_filled(rows: datasets.Dataset, name: str):
    """The first value of a column that is not empty; None if there is none."""
    return next((value for value in _cells(rows, name) if value not in (None, "", [], {})), None)


def with_context(row: dict) -> dict:
    """The row with the text that belongs to its instruction behind it, after a blank line."""
    context = row.get("context")
    if not context or (isinstance(context, str) and not context.strip()):
        return row
    if not isinstance(context, str) or not isinstance(row["prompt"], str):
        raise RowProblem(
            "wrong type", f"an instruction with a text beside it must be two strings, found {context!r:.60}"
        )
    return row | {"prompt": f"{row['prompt']}\n\n{context}"}


def _cells(rows: datasets.Dataset, name: str) -> Iterator:
    """The values of a column, read only as far as needed, and pictures not decoded."""
    tables: Any = rows.select_columns([name]).with_format("arrow").iter(batch_size=1000)
    return (cell.as_py() for cell in chain.from_iterable(table[name] for table in tables))
