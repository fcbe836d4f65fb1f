"""Options of other libraries: each is answered with what to write instead, and that is an option here."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from fastalign.cli import foreign, table
from fastalign.cli.run_options import RunOptions

KNOWN = {f.name for f in fields(RunOptions)} | set(table.of_method("preference"))


@pytest.mark.parametrize("name", foreign._INSTEAD)
def test_what_is_named_instead_exists(name):
    assert name not in KNOWN
    said = foreign.remedy(name, sorted(KNOWN))
    for option in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", said):
        assert option in KNOWN or option == "keep_end"


def test_other_names_get_the_nearest():
    assert foreign.remedy("learning_rat", sorted(KNOWN)).startswith("did you mean 'learning_rate'?")
    assert (
        "fastalign dpo --help" in foreign.remedy("zzzz", sorted(KNOWN))
        and len(foreign.remedy("zzzz", sorted(KNOWN))) < 200
    )
