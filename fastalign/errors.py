"""The errors that fastalign raises on purpose.

Each message is one sentence with the value that was found, what was expected, and the remedy. Every class also derives
from the built-in error of its kind, so that code which catches ValueError or RuntimeError works unchanged.
"""

from __future__ import annotations


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
