"""`fastalign tax`; what it measures and prints is in tests/evaluation/test_tax.py."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(("option", "value"), [("--length", "1"), ("--max-tokens", "0")])
def test_bad_numbers_are_refused_before_anything_is_loaded(refused, option, value):
    said = refused("tax", "./nowhere", "./nowhere", "--text", "nowhere.txt", option, value)
    assert f"is {value}; it must be 2 or more" in said


def test_text_is_needed(refused):
    assert "--text" in refused("tax", "a", "b")
