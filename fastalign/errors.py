"""The project's own errors: each carries one sentence with the value found, what was expected, and the remedy."""

from __future__ import annotations


class FastAlignError(Exception):
    """Any error that fastalign raises on purpose."""


class InputError(FastAlignError, ValueError):
    """A tensor or an argument does not fit the function it was given to."""


class DataError(FastAlignError, ValueError):
    """A data set, or one of its rows, cannot be used as it is."""


class ConfigError(FastAlignError, ValueError):
    """An option is unknown, or its value is."""


class ModelError(FastAlignError, ValueError):
    """A model, tokenizer or model folder cannot be used as it is."""


class BackendError(FastAlignError, RuntimeError):
    """A backend was asked for by name and cannot run here."""
