"""Which columns of a data set are read, and as what: aliases of columns, and columns that change what a row means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import datasets

from fastalign.data.messages import WEIGHTS
from fastalign.errors import DataError

# Names that people give to a field, the best one first.
ALIASES = {
    "prompt": ("prompt", "instruction", "question", "query", "input", "conversations"),
    "completion": ("completion", "response", "output", "answer"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "context": ("input", "context"),
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
# Fields that a format reads where the column is there.
OPTIONAL = ("system", "context", "tools", "chat_template_kwargs")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


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
        name = next((name for name in ALIASES.get(field, (field,)) if name in filled), None)
        if name is None or name in found.values():
            return None
        found[field] = name
    if columns == ("text",):
        return found
    for field in OPTIONAL:
        name = next((name for name in ALIASES[field] if name in filled and name not in found.values()), None)
        # Text beside an instruction belongs to it. Beside a column that is called prompt it may be anything.
        if name and (field != "context" or found.get("prompt") in ("instruction", "question", "query")):
            found[field] = name
    return found


def unread_columns(rows: datasets.Dataset, read: Mapping[str, str]) -> list[str]:
    """The columns that hold text, or lists, but are not read."""
    kinds = rows.features
    return [
        name
        for name in rows.column_names
        if name not in read.values() and _holds_text(kinds[name]) and _first_filled(rows, name) is not None
    ]


def _holds_text(feature) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string", "string_view")
    if isinstance(feature, datasets.List):
        return _holds_text(feature.feature)
    return isinstance(feature, (dict, datasets.Json))  # structs, as in a list of messages


def refuse_changed_meaning(rows: datasets.Dataset, fields: Mapping[str, str]) -> None:
    """Refuses columns that would have to change the training of a row, but do not.

    Raises:
        DataError: such a column holds a value.
    """
    for name in rows.column_names:
        if name in fields.values():
            continue
        if name in MEDIA and _first_filled(rows, name) is not None:
            raise DataError(
                f"The column {name!r} holds values: only text is trained on. Remove the column to train on the text."
            )
        if name == "history" and "prompt" in fields and _first_filled(rows, name) is not None:
            raise DataError(
                "The column 'history' holds values: earlier turns are read from messages alone. Write each row as "
                "'messages', or remove the column."
            )
        if name == "label" and "messages" in fields and _first_filled(rows, name) is not None:
            raise DataError(
                "The column 'label' beside 'messages' would not be used: split the messages into 'prompt' and "
                "'completion' for labelled rows, or remove the column."
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


def _first_filled(rows: datasets.Dataset, name: str):
    return next((value for value in _cells(rows, name) if value not in (None, "", [], {})), None)


def _cells(rows: datasets.Dataset, name: str) -> Iterator:
    """The values of a column, read only as far as needed, and pictures not decoded."""
    tables: Any = rows.select_columns([name]).with_format("arrow").iter(batch_size=1000)
    return (cell.as_py() for cell in chain.from_iterable(table[name] for table in tables))
