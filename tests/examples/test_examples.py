"""Examples and notebooks run as they stand, on a tiny model."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(path.name for path in (EXAMPLES / "notebooks").glob("*.py"))


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory, tiny_llama, tokenizer):
    folder = tmp_path_factory.mktemp("tiny-teacher")
    tiny_llama(seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, model_dir, teacher_dir, tmp_path, monkeypatch, capsys):
    options = {"own_loop.py": [], "distil_topk.py": ["--teacher", str(teacher_dir), "--out", "run"]}
    arguments = ["--model", str(model_dir), "--steps", "2", *options.get(name, ["--out", "run"])]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "loss" in last or "divergence" in last
    assert "nan" not in last


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_short(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, model_dir, tmp_path, monkeypatch, capsys):
    text = (EXAMPLES / "notebooks" / name).read_text(encoding="utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", str(model_dir))
    monkeypatch.setenv("STEPS", "2")
    runpy.run_path(str(EXAMPLES / "notebooks" / name), run_name="__main__")
    assert capsys.readouterr().out.strip()
