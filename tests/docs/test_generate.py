"""The generated parts of the reference say what the package holds."""

# ruff: noqa: RUF001  formulas have Greek letters

from __future__ import annotations

import re
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location
from inspect import get_annotations, signature
from pathlib import Path

import pytest

import fastalign
from fastalign.losses import PAIRWISE, UNPAIRED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generate():
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(table: str) -> list[list[str]]:
    """The rows of a table below its head, without the marks of code."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()[2:]]
    return [[cell.strip().replace("`", "").replace(r"\|", "|") for cell in line] for line in lines]


@pytest.mark.parametrize("name", ["SFTConfig", "DistillationConfig", "PreferenceConfig"])
def test_options_are_the_fields_with_their_defaults(generate, name):
    config = getattr(fastalign, name)
    own = [f for f in fields(config) if f.name in get_annotations(config)]
    table = cells(generate.options(name))
    assert [row[0] for row in table] == [f.name for f in own]
    for field, (_, _, default, meaning) in zip(own, table, strict=True):
        value = field.default_factory() if callable(field.default_factory) else field.default
        assert eval(default) == value
        assert meaning == field.metadata["help"].replace("`", "")


def test_a_choice_is_shown_with_its_strings(generate):
    kinds = {name: kind for name, kind, *_ in cells(generate.options("AlignmentConfig"))}
    assert kinds["on_invalid"] == "'error' or 'drop'"


@pytest.mark.parametrize(("table", "losses"), [("PAIRWISE", PAIRWISE), ("UNPAIRED", UNPAIRED)])
def test_every_loss_has_its_row(generate, table, losses):
    rows = {re.match(r"\[(\w+)\]", row[0])[1]: row for row in cells(generate.loss_table(table))}
    assert list(rows) == list(losses)
    assert all("arxiv.org/abs/" in row[2] for row in rows.values())


@pytest.mark.parametrize(
    ("name", "formula", "reference", "averaged"),
    [
        ("dpo", "-(1 - ε) log σ(β m) - ε log σ(-β m)", "yes", "no"),
        ("dpo_norm", "-(1 - ε) log σ(β m) - ε log σ(-β m)", "yes", "yes"),
        ("ipo_tau", "(β m - τ)²", "yes", "yes"),
        ("cpo", "-(1 - ε) log σ(x) - ε log σ(-x) with x = β (chosen - rejected)", "no", "no"),
        ("simpo", "-(1 - ε) log σ(x) - ε log σ(-x) with x = β (chosen - rejected - γ / β)", "no", "yes"),
    ],
)
def test_rows_of_losses(generate, name, formula, reference, averaged):
    row = next(row for row in cells(generate.loss_table("PAIRWISE")) if row[0].startswith(f"[{name}]"))
    assert row[1] == formula and row[3:5] == [reference, averaged]


def test_fused_calls_are_those_that_can_be_imported(generate):
    named = {row[0] for row in cells(generate.fused_calls())}
    exported = {name for name in fastalign.__all__ if name.startswith("fused_linear_")}
    assert named == exported - {"fused_linear_preference", "fused_linear_sft"}
    assert all(callable(getattr(fastalign, name)) and signature(getattr(fastalign, name)) for name in named)


def test_every_mark_of_the_pages_is_replaced(generate):
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")]
    marks = [mark for page in pages for mark in generate.MARK.findall(page)]
    assert {kind for kind, _ in marks} == set(generate.KINDS)
    assert not any("<!-- generated:" in generate.expand(page) for page in pages)


@pytest.mark.parametrize("name", ["concise", "dpo-smollm2", "tax"])
def test_the_page_of_a_recipe_is_its_readme(generate, name):
    """Its words stand in one place; links lead to pages of the site, and pictures are found from docs/recipes."""
    folder = ROOT / "fastalign" / "recipes" / name
    page = generate.expand((ROOT / "docs" / "recipes" / f"{name}.md").read_text(encoding="utf-8"))
    links = r"!?\[[^\]]*\]\([^)]*\)|`fastalign/recipes/[^`]*`"
    readme = re.split(links, (folder / "README.md").read_text(encoding="utf-8"))
    assert re.split(links, page)[: len(readme) - 1] == readme[:-1] and readme[-1] in page
    for target in re.findall(r"\]\(([^)]*)\)", page):
        assert target.startswith("http") or (ROOT / "docs" / "recipes" / target).exists(), target
    assert ("```yaml" in page) == (folder / "recipe.yaml").exists()


@pytest.mark.parametrize(
    "mark", ["recipe no-such-one", "options NoConfig", "unknown", "command fly", "losses FISHER_NONE"]
)
def test_what_is_not_there_ends_the_build(generate, mark):
    with pytest.raises(generate.ReferenceProblem):
        generate.expand(f"<!-- generated: {mark} -->")


def test_files_that_the_pages_of_explanation_name_are_there():
    for page in (ROOT / "docs" / "explanation").glob("*.md"):
        named = re.findall(r"`((?:fastalign|csrc|kernels|tests|bench)/[\w/.-]+)`", page.read_text(encoding="utf-8"))
        assert not [path for path in named if not (ROOT / path).exists()], page
