"""Options as TRL's command line writes them, `--key value`, to fastalign's `key=value`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

_KEPT = ("--config", "--help")  # arguments of the commands themselves


def as_assignments(words: Iterable[str]) -> list[str]:
    """The words of a method's command line with every `--key value` written as `key=value`.

    - `--key=value` and `--key value` become `key=value`; dashes in the key become underscores.
    - `--key one two` becomes a list.
    - `--key` without a value becomes `key=true`, `--no_key` without a value `key=false`.
    - `--config FILE` and `--help` stay, and so do words that are `key=value` already.

    Args:
        words: What follows the command.

    Returns:
        The words as `fastalign` reads them.
    """
    words, result = list(words), []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("--") or name in _KEPT:
            result.append(word)
            if word == "--config" and words:
                result.append(words.pop(0))
            continue
        key = name[2:].replace("-", "_")
        if equals:
            result.append(f"{key}={value}")
            continue
        values = []
        while words and not words[0].startswith("--") and not re.match(r"[a-z]\w*=", words[0]):
            values.append(words.pop(0))
        result.append(_assignment(key, values))
    return result


def _assignment(key: str, values: list[str]) -> str:
    if not values:
        return f"{key[3:]}=false" if key.startswith("no_") else f"{key}=true"
    if len(values) == 1:
        return f"{key}={values[0]}"
    import yaml

    return f"{key}={json.dumps([yaml.safe_load(value) for value in values])}"
