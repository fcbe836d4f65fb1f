"""Room for an answer. The answers themselves are in test_generate.py."""

from __future__ import annotations

from fastalign.cli.answers import positions


def test_positions_of_a_model(tiny_llama):
    assert positions(tiny_llama()) == 256
