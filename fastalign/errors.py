"""The errors that fastalign raises on purpose.

Each message is one sentence with the value that was found, what was expected, and the remedy. Every class also derives
from the built-in error of its kind, so that code which catches ValueError or RuntimeError works unchanged.
"""

from __future__ import annotations

import errno
import os
import re

# Control characters without line feed and tab, what turns the direction of writing, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# Errors of a disk that is full, read-only or broken, and of files that may not be touched or get too large.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_OS_ERROR = re.compile(r"os error (\d+)")  # how libraries in Rust, such as safetensors, write the number
# How the allocators of torch, of its libraries, of C++ and of the kernel say it, where they raise a RuntimeError.
_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "bad_alloc", "ALLOC_FAILED")


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError) or _number(error) == errno.ENOMEM:
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def disk_error(error: BaseException) -> str | None:
    """What the system says of a disk that is full, read-only or broken; None if the error is another one."""
    number = _number(error)
    return os.strerror(number) if number in _DISK else None


def _number(error: BaseException) -> int | None:
    """The number that the system gave an error, also where a library in Rust has written it into its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def resource_sentence(error: BaseException) -> str | None:
    """One sentence on an error that comes from a full or read-only disk or from missing memory; None for any other.

    Such an error can come out of any library at any place. The errors that it was raised from are looked at too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if is_out_of_memory(seen):
            return (
                "memory ran out: lower the batch size (per_device_train_batch_size, --batch-size) or max_length, take "
                "a smaller model, or end other programs; `fastalign plan` says what a run needs"
            )
        if (reason := disk_error(seen)) is not None:
            name = getattr(seen, "filename", None)
            return f"{name or 'a file'} cannot be written or read: {reason}; make room, or name another folder"
        seen = seen.__cause__ or seen.__context__
    return None
