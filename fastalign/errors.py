"""The errors that fastalign raises on purpose.

Each message is one sentence with the value that was found, what was expected, and the remedy. Every class also derives
from the built-in error of its kind, so that code which catches ValueError or RuntimeError works unchanged.
"""

from __future__ import annotations

import re

# Control characters without line feed and tab, what turns the direction of writing, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class FastAlignError(Exception):
    """Any error that fastalign raises on purpose: catch this one for all of them."""


class InputError(FastAlignError, ValueError):
    """A tensor or an argument does not fit the function that it was passed to."""


class DataError(FastAlignError, ValueError):
    """A data set, or one of its rows, cannot be used as it is."""


class ConfigError(FastAlignError, ValueError):
    """An option is unknown, or its value is out of range."""


class ModelError(FastAlignError, ValueError):
    """A model, tokenizer or model folder cannot be used as it is."""


class BackendError(FastAlignError, RuntimeError):
    """A backend that was requested by name cannot run here."""


class TrainingError(FastAlignError, RuntimeError):
    """A run had to stop: its loss or its gradients are not finite."""


def printable(text: object) -> str:
    r"""Text that a terminal shows as it is.

    Paths, rows and models may hold control characters, which could move the cursor, change colours or turn the
    direction of writing. They are written as Python writes them, for example \x1b. Line breaks and tabs stay.
    A carriage return before a line break is dropped.
    """
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], str(text).replace("\r\n", "\n"))
