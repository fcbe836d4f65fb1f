"""The shipped suites are what their scripts write."""

from __future__ import annotations

import pytest

from bench.shipped.suites import FOLDER, SUITES, text_of


@pytest.mark.parametrize("name", SUITES)
def test_files_are_what_the_scripts_write(generated, name):
    generated(FOLDER / f"{name}.jsonl", text_of(name))
