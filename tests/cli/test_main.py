"""The command line's entry: help, exit codes, the one sentence of an error, and what it imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fastalign
from fastalign.cli import info, main

HERE = Path(__file__).parent
HEAVY = ("torch", "transformers", "peft", "numpy", "datasets", "accelerate", "matplotlib", "rich")
# Modules that `fastalign --help` imports, the standard library's included: about 150, one for each command among them.
MOST_MODULES = 160


def run(folder: Path, code: str, *argv: str, python: str = sys.executable) -> str:
    """What the code prints, in another process outside the checkout."""
    return subprocess.run([python, "-c", code, *argv], cwd=folder, capture_output=True, text=True, check=True).stdout


LOADED = """
import contextlib, io, json, sys
from fastalign.cli.main import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    try:
        status = main(sys.argv[1:])
    except SystemExit as stopped:
        status = stopped.code
print(json.dumps([status, sorted(sys.modules)]))
"""


def test_help_is_as_it_was_read_last(monkeypatch, shown, generated):
    monkeypatch.setenv("COLUMNS", "100")
    text = shown("--help")
    assert "==SUPPRESS==" not in text
    lines = text.splitlines()
    assert len(lines) <= 46 and max(map(len, lines)) <= 120  # a screen
    generated(HERE / "help.txt", text)


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["dpo", "--help"], 0),
        (["dpo"], 2),
        (["dop"], 2),
        (["dpo", "betta=1"], 2),
        (["dpo", "model=./nowhere", "train=nowhere.jsonl", "beta=0.1"], 2),
        (
            ["dpo", "model=a/b", "train=rows.jsonl", "regularizers=[{name: ewc, fisher: no.safetensors, strength: 1}]"],
            2,
        ),
        (["tax", "a", "b", "--text", "c", "--length", "0"], 2),
    ],
)
def test_nothing_heavy_is_imported_to_show_help_or_to_refuse_options(tmp_path, argv, status):
    (tmp_path / "rows.jsonl").touch()
    found, modules = json.loads(run(tmp_path, LOADED, *argv))
    assert found == status
    assert not set(HEAVY) & set(modules)
    if argv == ["--help"]:
        assert len(modules) <= MOST_MODULES


def test_version(shown):
    assert shown("--version").split() == ["fastalign", fastalign.__version__]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["dop"], "There is no command 'dop'; did you mean 'dpo'?"),
        (["trian"], "did you mean 'train'?"),
        (["zzzz"], "`fastalign --help` lists the commands"),
        ([], "COMMAND; see `fastalign --help`"),
        (["data"], "ACTION; see `fastalign data --help`"),
        (["data", "chek"], "invalid choice: 'chek'"),
        (["fisher", "model", "--text", "a.txt"], "--out; see `fastalign fisher --help`"),
        (["tax", "a", "b", "--text", "c", "--length", "long"], "--length: invalid int value: 'long'"),
    ],
)
def test_bad_commands_are_one_sentence(refused, argv, said):
    sentence = refused(*argv)
    assert said in sentence and len(sentence) < 160


# Exit codes


@pytest.mark.parametrize("status", [0, 1])
def test_a_command_decides_between_yes_and_no(monkeypatch, status):
    monkeypatch.setattr(info, "main", lambda args: status)
    assert main.main(["info"]) == status


def test_interrupt_is_130(monkeypatch, capsys):
    def interrupted(args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(info, "main", interrupted)
    assert main.main(["info"]) == 130
    assert capsys.readouterr().err == "fastalign: stopped\n"


def test_sigterm_is_143_and_unwinds(monkeypatch, capsys):
    unwound = []

    def terminated(args):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            unwound.append(True)

    monkeypatch.setattr(info, "main", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert main.main(["info"]) == 143
    assert unwound and capsys.readouterr().err == "fastalign: stopped\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_runs_in_another_thread_too(monkeypatch):
    """There no handler may be set."""
    found = []
    monkeypatch.setattr(info, "main", lambda args: 0)
    thread = threading.Thread(target=lambda: found.append(main.main(["info"])))
    thread.start()
    thread.join()
    assert found == [0]


def broken(args):
    raise RuntimeError("a tensor\nof another shape")


def test_unforeseen_errors_are_one_sentence_and_a_traceback_in_a_file(monkeypatch, refused):
    monkeypatch.setattr(info, "main", broken)
    sentence = refused("info")
    assert "stopped by RuntimeError: a tensor of another shape" in sentence
    written = Path(re.search(r"the traceback is in (.+)\)$", sentence)[1])
    assert "in broken" in written.read_text() and "of another shape" in written.read_text()


def test_traceback_of_a_run_lies_in_its_folder(monkeypatch, refused, rows, model_dir, tmp_path):
    from fastalign.cli import run

    monkeypatch.setattr(run, "load_tokenizer", broken)
    sentence = refused("dpo", f"model={model_dir}", f"train={rows}", f"output_dir={tmp_path / 'run'}", "use_cpu=true")
    assert str(tmp_path / "run" / "traceback.txt") in sentence
    assert "in broken" in (tmp_path / "run" / "traceback.txt").read_text()


def test_a_traceback_that_cannot_be_written_changes_nothing_else(monkeypatch, refused):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(info, "main", broken)
    monkeypatch.setattr(Path, "write_text", full)
    sentence = refused("info")
    assert "stopped by RuntimeError: a tensor of another shape (no folder can be written" in sentence


# Other Pythons: what shows help must import nothing that is not in the standard library


def interpreters() -> dict[str, str]:
    """Version -> path of the other Pythons on PATH, and of those that pyenv installed; this one is always there."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    folders += sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*/bin"))
    for minor in ("3.10", "3.12", "3.13"):
        for path in (folder / f"python{minor}" for folder in folders):
            # A shim of pyenv is there for every version, and fails for most.
            if path.is_file() and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
                found.setdefault(minor, str(path))
    return found


@pytest.mark.parametrize("python", interpreters().items(), ids=lambda item: item[0])
def test_other_pythons_compile_every_source_and_show_help_without_torch(python, tmp_path):
    _, path = python
    package = Path(fastalign.__file__).resolve().parent
    compiled = (
        "import pathlib, sys\nfor p in pathlib.Path(sys.argv[1]).rglob('*.py'): compile(p.read_bytes(), p, 'exec')"
    )
    subprocess.run([path, "-W", "error", "-c", compiled, package], check=True, cwd=tmp_path)
    # -S: without site-packages, so that anything beside the standard library fails.
    command = [path, "-S", "-c", "import sys; from fastalign.cli.main import main; sys.exit(main(sys.argv[1:]))"]
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "100", "PYTHONDONTWRITEBYTECODE": "1"}

    def said(*argv):
        return subprocess.run(
            [*command, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    assert said("--version").stdout == f"fastalign {fastalign.__version__}\n"
    assert said("--help").stdout == (HERE / "help.txt").read_text()
    assert "num_train_epochs" in said("dpo", "--help").stdout
    refused = said("dpo")
    assert refused.returncode == 2 and "model is missing" in refused.stderr
