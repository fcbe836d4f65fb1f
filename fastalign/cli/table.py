"""The options of every method, read from options.json instead of from the classes that define them.

The classes derive from `transformers.TrainingArguments`, which takes seconds to import. The table holds what the
command line needs to list, check and suggest options: name, type, default and help. `make generated` writes it from the
classes, and a test holds it equal to them.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign.options import convert

FILE = Path(__file__).with_name("options.json")
Option = Mapping[str, Any]  # type, default (if it has one), help, path

# The types that are checked here, before anything heavy is imported. Options of other types, such as enumerations, are
# checked by the class that defines them.
_TYPES: dict[str, Any] = {
    "None": type(None), "bool": bool, "int": int, "float": float, "str": str, "dict": dict, "list": list,
    "list[str]": list[str], "list[int]": list[int], "list[float]": list[float], "dict[str, Any]": dict,
}  # fmt: skip


@functools.cache
def read() -> dict[str, Any]:
    """The contents of options.json."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def losses() -> list[str]:
    """Every preference loss."""
    return read()["losses"]


def aliases() -> list[str]:
    """TRL's names of the preference losses, where they differ."""
    return read()["aliases"]


def inherited() -> dict[str, Option]:
    """The options that come from `transformers.TrainingArguments`."""
    return read()["inherited"]


def own(method: str) -> dict[str, Option]:
    """The options that fastalign adds to a method, or whose default it changes."""
    return read()["methods"][method]


def of_method(method: str) -> dict[str, Option]:
    """Every option of a method."""
    return {**inherited(), **own(method)}


def regularizer(name: str) -> dict[str, Option]:
    """The options of a regulariser."""
    return read()["regularizers"][name]


def paths(options: Mapping[str, Option]) -> set[str]:
    """The names of the options that hold a path."""
    return {name for name, option in options.items() if option.get("path")}


def check_types(values: Mapping[str, Any], options: Mapping[str, Option]) -> None:
    """Checks plain values by the types of the table.

    Raises:
        ConfigError: A value does not fit.
    """
    for key, value in values.items():
        if key in options and (hint := _hint(options[key]["type"])) is not None:
            convert(key, value, hint)


def _hint(text: str) -> Any:
    """The type that a text such as `list[str] | None` means; None if a part of it is not among _TYPES."""
    parts = text.split(" | ")
    return functools.reduce(operator.or_, (_TYPES[part] for part in parts)) if _TYPES.keys() >= set(parts) else None
