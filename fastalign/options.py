"""Options as dataclass fields: declared with their help, converted from plain values, checked, suggested."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any

from fastalign.errors import ConfigError, FastAlignError


def help_field(default: Any, text: str) -> Any:
    """A dataclass field with a default and the sentence that `--help` shows."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": text})


def one_of(option: str, value: object, allowed: Iterable[str]) -> None:
    """ConfigError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(f"{option} is {value!r}; {nearest(str(value), allowed)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?', or the list of what there is."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"


def from_mapping(cls: type, options: Mapping[str, Any]) -> Any:
    """An instance of a config dataclass from plain values (YAML, command line), each checked and converted.

    ConfigError names an unknown key with the nearest known one, and a value that does not fit its type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls) if f.init}
    values = {}
    needed = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"Unknown option {key!r} of {cls.__name__}; {nearest(key, known)}")
        values[key] = convert(key, value, known[key])
    if missing := [key for key in needed if key not in values]:
        raise ConfigError(f"{missing[0]} of {cls.__name__} is missing; give {', '.join(needed)}")
    try:
        return cls(**values)
    except FastAlignError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # of TrainingArguments
        raise ConfigError(" ".join(str(error).split())) from error


def convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` says, where nothing is lost: 1 to 1.0, "1e-4" (a string to YAML) to 0.0001."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = [typing.get_origin(option) or option for option in options]
    if value is None and type(None) in plain:
        return None
    for option, of in zip(options, plain, strict=True):
        if of is list and isinstance(value, list) and typing.get_args(option):
            return [convert(key, item, *typing.get_args(option)) for item in value]
        if isinstance(of, type) and isinstance(value, of) and (of is bool or not isinstance(value, bool)):
            return value
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        for target in (int, float):
            if target in plain:
                try:
                    return target(value)
                except ValueError:
                    continue
    members = {name for of in plain for name in getattr(of, "__members__", ())}
    if value is False and "NO" in members:
        return "no"  # which YAML reads as False
    if all(isinstance(of, type) for of in plain) and not members:
        expected = " or ".join("None" if of is type(None) else of.__name__ for of in plain)
        raise ConfigError(f"{key} is {value!r}; expected {expected}")
    return value  # an enumeration or a rarer type: TrainingArguments converts and checks it
