"""README: short, and its snippets run as pasted, on a tiny model in place of the packaged one."""

import json
import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
PACKAGED = "smollm2-135m-instruct"


@pytest.fixture
def folder(tmp_path, monkeypatch, pairs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    (tmp_path / "prose.txt").write_text("The river rises in the hills. " * 20, encoding="utf-8")
    return tmp_path


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_every_loss_is_in_the_table():
    from fastalign.losses import PAIRWISE, UNPAIRED

    rows = re.findall(r"^\| (?:pairs|labelled rows)[^|]*\|([^|]*)\|", README, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == {*PAIRWISE, *UNPAIRED}


def test_there_are_snippets():
    assert len(PYTHON) >= 2 and any("fastalign dpo" in block for block in SHELL)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_snippet(code, folder, model_dir):
    exec(compile(code.replace(PACKAGED, str(model_dir)), "README.md", "exec"), {"__name__": "__main__"})


def test_commands(folder, model_dir, capsys):
    from fastalign.cli.main import main

    lines = [line.partition(" #")[0].strip() for block in SHELL for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("fastalign ")]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.replace(PACKAGED, str(model_dir)))[1:]
        if words[0] == "dpo" and "--help" not in words:
            words += ["max_steps=2", "samples=1", "max_new_tokens=2", "disable_tqdm=true"]
        if words[0] == "tax":
            words += ["--length", "64"]  # the tiny model has few positions
        try:
            assert main(words) == 0, command
        except SystemExit as stop:  # --help
            assert stop.code == 0, command


def test_the_map_names_what_is_there():
    root = Path(__file__).parent.parent
    rows = re.findall(r"^\| `([\w./]+)` \|", README, re.MULTILINE)
    assert len(rows) >= 8
    assert not [row for row in rows if not (root / row).exists()]


def test_links_lead_somewhere():
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert links and not [link for link in links if not (root / link).exists()]
