"""The errors can be caught together, and as the built-in errors that people catch anyway."""

import errno

import pytest

from fastalign import errors
from fastalign.errors import resource_sentence


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InputError, ValueError),
        (errors.DataError, ValueError),
        (errors.ConfigError, ValueError),
        (errors.ModelError, ValueError),
        (errors.BackendError, RuntimeError),
        (errors.TrainingError, RuntimeError),
    ],
)
def test_each_error_is_one_of_ours_and_of_its_kind(error, kind):
    for caught in (errors.FastAlignError, kind):
        with pytest.raises(caught, match="what was found"):
            raise error("what was found")


def test_every_error_is_listed_above():
    public = {value for value in vars(errors).values() if isinstance(value, type)}
    assert public == {*errors.FastAlignError.__subclasses__(), errors.FastAlignError} and len(public) == 7


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07\x9b", r"\x1b[31mred\x07\x9b"),
        ("a\tb\nc \u00a0\u200d[/x] \u00e9\U0001f600", "a\tb\nc \u00a0\u200d[/x] \u00e9\U0001f600"),
        ("a\r\nb\x1b[2J", "a\nb\\x1b[2J"),
        ("over\rwritten \u202egnp.exe \ud800", r"over\rwritten \u202egnp.exe \ud800"),
    ],
)
def test_a_terminal_shows_text_as_it_is(text, shown):
    assert errors.printable(text) == shown
    errors.printable(text).encode()


def test_a_full_disk_and_missing_memory_are_one_sentence_wherever_they_come_from():
    """A library may have raised an error of its own from it, or have written the number into a text."""
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "a.safetensors")
        except OSError as error:
            raise ValueError("the table cannot be made") from error
    except ValueError as error:
        assert resource_sentence(error) == (
            "a.safetensors cannot be written or read: No space left on device; make room, or name another folder"
        )
    assert "File too large" in (resource_sentence(RuntimeError("I/O error: too large (os error 27)")) or "")
    for error in (MemoryError(), RuntimeError("std::bad_alloc"), OSError(errno.ENOMEM, "Cannot allocate memory")):
        assert (resource_sentence(error) or "").startswith("memory ran out: lower the batch size")
    for error in (KeyError("a"), RuntimeError("size mismatch"), OSError(errno.ENOENT, "No such file")):
        assert resource_sentence(error) is None
