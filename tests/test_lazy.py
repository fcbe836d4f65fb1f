"""Names that are imported when they are first used: what a package shows, and that importing it stays cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import fastalign
from fastalign import lazy

README = Path(__file__).parent.parent / "README.md"


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_and_missing_a_name_do_not_import_torch():
    code = """
import sys, fastalign
print(hasattr(fastalign, "PreferenceTrainr"), hasattr(fastalign, "__wrapped__"), fastalign.__version__)
print(sorted({"torch", "transformers", "numpy", "peft", "datasets"} & sys.modules.keys()))
print(sorted(name for name in sys.modules if name.startswith("fastalign.")))
"""
    light = ["fastalign.errors", "fastalign.lazy", "fastalign.models", "fastalign.models.offline", "fastalign.options"]
    assert run(code) == f"False False {fastalign.__version__}\n[]\n{light}\n"


def test_dir_and_star_show_every_name():
    exported: dict[str, object] = {}
    exec("from fastalign import *", exported)
    for names in (dir(fastalign), fastalign.__all__, exported):
        assert {"fused_linear_dpo", "fused_linear_kto", "fused_linear_sft", "PreferenceTrainer", "EWC"} <= set(names)
    assert len(fastalign.__all__) == len(set(fastalign.__all__)) and fastalign.__all__ == sorted(fastalign.__all__)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("PreferenceTrainr", "did you mean 'PreferenceTrainer'"),
        ("fused_linear_dop", "did you mean 'fused_linear_dpo'"),
        ("zzz", "choose from Distillation, "),
    ],
)
def test_a_misspelt_name_is_an_attribute_error_with_the_nearest_one(name, hint):
    with pytest.raises(AttributeError, match=f"module 'fastalign' has no attribute '{name}'; {hint}"):
        getattr(fastalign, name)
    assert not hasattr(fastalign, name)


def test_a_name_is_looked_up_once(monkeypatch):
    package: Any = types.ModuleType("package")
    monkeypatch.setitem(sys.modules, "package", package)
    lazy.lazy_exports("package", {"Path": "pathlib", "is*": "keyword"})
    assert package.__all__ == ["Path", "iskeyword", "issoftkeyword"]
    assert "Path" in dir(package) and "Path" not in vars(package)
    assert package.Path is Path is vars(package)["Path"]
    assert package.iskeyword("def") and "iskeyword" in vars(package) and "issoftkeyword" not in vars(package)


@pytest.mark.parametrize("name", fastalign.__all__)
def test_every_name_is_there(name):
    value = getattr(fastalign, name)
    assert vars(fastalign)[name] is value  # held for the next access


def imported_names(text: str) -> set[str]:
    """The names that the Python blocks of a page import from fastalign."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes if node.module == "fastalign" for alias in node.names}


def test_whatever_the_readme_imports_is_there():
    names = imported_names(README.read_text(encoding="utf-8"))
    assert names, "README.md has no Python block that imports from fastalign"
    for name in names:
        assert getattr(fastalign, name)


@pytest.mark.parametrize(
    "name",
    [
        "accumulate_fisher_", "ewc_penalty", "ewc_penalty_", "fisher_diagonal", "linear_divergence", "linear_logprobs",
        "logits_divergence", "lora_ewc_penalty", "preference_loss", "segment_sum", "selective_logprobs",
        "sparse_divergence", "sparse_logits_divergence",
    ],
)  # fmt: skip
def test_the_functions_that_pages_speak_of_are_names_of_the_package(name):
    assert callable(getattr(fastalign, name)) and name in fastalign.__all__
