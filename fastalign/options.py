"""Options as dataclass fields: declared with their help, converted from plain values, checked, suggested."""

from __future__ import annotations

import contextlib
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, Literal

from fastalign.errors import ConfigError, FastAlignError

_MOST_LISTED = 40  # names in an error, which is one sentence

# What happens to rows that are too long, and to rows that cannot be used: options of the data and of each trainer.
OnTruncate = Literal["error", "drop", "keep_end", "keep_start"]
OnInvalid = Literal["error", "drop"]
# What happens to the adapter that a model comes with: it becomes part of the weights, or it is trained further.
GivenAdapter = Literal["merge", "continue"]


def help_field(default: Any, text: str, *, path: bool = False) -> Any:
    """A dataclass field with a default and the sentence that `--help` shows.

    Args:
        default: The value of the option when nobody sets it. A list is copied for each instance.
        text: One sentence: what the option does, its unit, and what None means.
        path: Whether the value names a file or a folder. In a YAML file, `./` and `../` at the start of such a value
            mean the folder of that YAML file.

    Returns:
        What `dataclasses.field` returns, with the metadata `help` and `path`.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Options:
        ...     train: str | None = help_field(None, "Training rows: a .jsonl file.", path=True)
    """
    metadata = {"help": text, "path": path}
    if isinstance(default, list):  # each instance gets a new list
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(option: str, value: object, allowed: Iterable[str]) -> None:
    """Checks a value that must be one of a few names.

    Args:
        option: The option's name, for the error.
        value: What was given.
        allowed: The names that may be given.

    Raises:
        ConfigError: `value` is none of them. The error suggests the nearest one, or lists all.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(f"{option} is {value!r}; {nearest(str(value), allowed)}")


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a mistyped one resembles most, or None if it resembles none."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: `did you mean 'X'?`, or the known names (some, if they are many)."""
    known = list(known)
    close = closest(name, known)
    if close:
        return f"did you mean {close!r}?"
    if len(known) > _MOST_LISTED:
        return f"it is none of the {len(known)} known ones, such as {', '.join(known[:3])} and {known[-1]}"
    return f"choose from {', '.join(known)}"


def check_keys(owner: str, options: Iterable[str], known: Iterable[str], needed: Iterable[str] = ()) -> None:
    """Checks the names of options, before any value is looked at.

    Args:
        owner: Whose options they are, for the error.
        options: The names that were given.
        known: The names that there are.
        needed: The names that must be given.

    Raises:
        ConfigError: A name is unknown, or a needed one is missing.
    """
    options, known, needed = list(options), list(known), list(needed)
    for key in options:
        if key not in known:
            raise ConfigError(f"Unknown option {key!r} of {owner}; {nearest(key, known)}")
    if missing := [key for key in needed if key not in options]:
        raise ConfigError(f"{missing[0]} of {owner} is missing; give {', '.join(needed)}")


def from_mapping(cls: type, options: Mapping[str, Any]) -> Any:
    """An instance of a config dataclass from plain values (YAML, command line), each checked and converted.

    Args:
        cls: A dataclass.
        options: Values by the name of a field.

    Returns:
        The instance.

    Raises:
        ConfigError: A name is unknown (the error suggests the nearest), a required option is missing, or a value does
            not fit its type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls) if f.init}
    needed = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    check_keys(cls.__name__, options, known, needed)
    values = {key: convert(key, value, known[key]) for key, value in options.items()}
    try:
        return cls(**values)
    except FastAlignError:
        raise
    except (
        ValueError,
        TypeError,
        ImportError,
        OSError,
        ArithmeticError,
        RuntimeError,
    ) as error:  # of TrainingArguments
        raise ConfigError(" ".join(str(error).split())) from error


def convert(key: str, value: Any, hint: Any) -> Any:
    """A plain value as the type that a field declares.

    Only what loses nothing is converted: 1 becomes 1.0, and "1e-4", which YAML reads as a string, becomes 0.0001.

    Args:
        key: The option's name, for the error.
        value: The value as YAML or the command line gave it.
        hint: The field's type.

    Returns:
        The value in one of the types of `hint`. A value of an enumeration or of a rarer type is returned as it is,
        because `TrainingArguments` converts and checks those.

    Raises:
        ConfigError: The value fits none of the types.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = [str if is_choice(option) else typing.get_origin(option) or option for option in options]
    if value is None and type(None) in plain:
        return None
    members = {name: member.value for of in plain for name, member in getattr(of, "__members__", {}).items()}
    if members and type(value) is str:
        one_of(key, value, members.values())
    for option, of in zip(options, plain, strict=True):
        if of is list and isinstance(value, list) and typing.get_args(option):
            return [convert(key, item, *typing.get_args(option)) for item in value]
        # bool is a subclass of int, but True is no number of steps.
        if isinstance(of, type) and isinstance(value, of) and (of is bool or not isinstance(value, bool)):
            return value
    if (number := _number(value, plain)) is not None:
        return number
    if {*plain} <= {str, type(None)} and _names_something(value) and not any(map(is_choice, options)):
        return str(value)  # YAML reads 2026 as a number and 2026-11-30 as a date
    if value is False and "NO" in members:
        return "no"  # which YAML reads as False
    if all(isinstance(of, type) for of in plain) and not members:
        expected = " or ".join("None" if of is type(None) else of.__name__ for of in plain)
        raise ConfigError(f"{key} is {value!r}; expected {expected}")
    return value


def _names_something(value: Any) -> bool:
    """Whether YAML made a number or a date of what was meant as a name."""
    # The type's name, since the module is not imported for `--help`.
    return type(value) is int or type(value).__module__ == "datetime"


def is_choice(hint: Any) -> bool:
    """Whether a type is a `Literal` of strings. It is converted as a string; the class checks which one it is."""
    return typing.get_origin(hint) is Literal and all(isinstance(value, str) for value in typing.get_args(hint))


def _number(value: Any, plain: list[Any]) -> int | float | None:
    """An int or a string as a number of one of these types, where it is one."""
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        for target in (int, float):
            if target in plain:
                with contextlib.suppress(ValueError):
                    return target(value)
    return None
