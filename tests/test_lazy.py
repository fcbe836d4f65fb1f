"""Packages whose public names are imported on first use."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import fastalign
from fastalign.lazy import lazy_exports


def test_importing_fastalign_imports_nothing_heavy(tmp_path):
    code = (
        "import json, sys\nbefore = set(sys.modules)\nimport fastalign\nprint(json.dumps([*{*sys.modules} - before]))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    added = json.loads(said)
    assert not {"torch", "numpy", "transformers", "peft", "datasets"} & set(added)
    assert {name for name in added if name.startswith("fastalign")} == {"fastalign", "fastalign.lazy"}
    assert len(added) <= 30  # with those of the standard library


def test_dir_lists_the_names_before_they_are_used(tmp_path):
    code = "import fastalign; print(*dir(fastalign))"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert set(fastalign.__all__) | {"__version__"} <= set(said.split())
    assert {"PreferenceTrainer", "EWC", "accumulate_fisher_", "fisher_diagonal", "ewc_penalty"} <= set(said.split())


@pytest.mark.parametrize("name", fastalign.__all__)
def test_every_name_is_there(name):
    value = getattr(fastalign, name)
    assert vars(fastalign)[name] is value  # held for the next access


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'fastalign' has no attribute 'PreferenceTrainr'"):
        _ = fastalign.PreferenceTrainr
    with pytest.raises(ImportError):
        from fastalign import PreferenceTrainr  # noqa: F401


def test_a_module_is_imported_on_first_use_only(monkeypatch):
    package = type(sys)("lazy_package")
    monkeypatch.setitem(sys.modules, "lazy_package", package)
    lazy_exports("lazy_package", {"sqrt": "math", "pow": "math"})
    assert package.__all__ == ["pow", "sqrt"]
    assert "sqrt" in dir(package) and "sqrt" not in vars(package)
    assert package.sqrt(9) == 3 and "sqrt" in vars(package)
