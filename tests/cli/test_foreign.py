"""Options of other libraries: each is answered with what to write instead, and that is an option here."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import fastalign
from fastalign.cli import foreign, main, table
from fastalign.cli.methods import METHODS
from fastalign.cli.run_options import RunOptions

KNOWN = {f.name for f in fields(RunOptions)} | set(table.of_method("preference"))
OF_ALL = KNOWN.union(*map(table.of_method, METHODS))
HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
LIBRARIES = ["trl", "llama-factory", "axolotl", "unsloth"]
COLUMNS = {"text"}  # of rows, which the pages name too


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


# The pages that put the options of other libraries beside ours.


def rows_of(page: str) -> list[tuple[str, str]]:
    """(their cell, our cell) of every table whose second column is ours."""
    text = (HOW_TO / f"from-{page}.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| [^|\n]+ \| (?:fastalign|becomes) \|\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [tuple(cell.strip() for cell in row.split("|")[1:3]) for rows in tables for row in rows.splitlines()]


def is_ours(span: str) -> bool:
    """Whether what stands in backticks is an option, with or without a value, a command, a class, or a loss."""
    if span.startswith("fastalign "):
        return span.split()[1] in {
            *METHODS,
            *table.losses(),
            *(command.__name__.split(".")[-1] for command in main.COMMANDS),
        }
    if " / " in span or span[0] in "\"'[{":  # a formula, or a value of the option before it
        return True
    name = re.match(r"\w*", span)[0]
    if span.startswith(f"{name}: "):  # as in a configuration file
        ((key, value),) = yaml.safe_load(span).items()
        options = {**table.of_method("preference"), **table.of_method("sft")}
        if not isinstance(value, (list, dict)) and key in options:
            table.check_types({key: value}, options)
    return name in OF_ALL | {*table.losses(), *table.aliases()} | COLUMNS or hasattr(fastalign, name)


@pytest.mark.parametrize("page", LIBRARIES)
def test_every_row_of_a_page_names_options_that_exist(page):
    rows = rows_of(page)
    assert len(rows) > 15
    for theirs, ours in rows:
        spans = re.findall("`([^`]+)`", theirs if ours.startswith("the same") else ours)
        if ours.startswith(("not here", "none")):
            assert len(ours) < 140, ours
            continue
        assert spans, f"{theirs} has nothing beside it"
        for span in spans:
            assert is_ours(span), f"{span!r}, beside {theirs}"


def test_the_check_of_rows_sees_what_is_wrong():
    assert is_ours("lora_rank: 0") and is_ours("fastalign ipo") and is_ours("nca_pair")
    assert not is_ours("lora_r") and not is_ours("fastalign axe") and not is_ours("micro_batch_size: 2")
    with pytest.raises(fastalign.errors.ConfigError):
        is_ours("max_length: many")
