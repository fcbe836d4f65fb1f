"""Every ```python block of the documentation runs as pasted, on a tiny model; commands and options are ones that exist.

The blocks of a page run in one namespace, from top to bottom, in a folder with a model, a teacher, and small files of
rows. What must not run is fenced as `py`, `sh` or `text`.
"""

from __future__ import annotations

import json
import re
import shlex
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line of its first line, text) of every block of a page in that language."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        indent, name, body = fence.groups()
        if name == language:
            lines = [line.removeprefix(indent) for line in body.splitlines()]
            found.append((text[: fence.start()].count("\n") + 2, "\n".join(lines) + "\n"))
    return found


def of_language(language: str) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, language)]


@pytest.fixture
def folder(tmp_path, monkeypatch, model_dir, tiny_llama, tokenizer, pairs, labelled):
    """The working folder of a snippet; what fastalign keeps between runs goes there too."""
    (tmp_path / "model").symlink_to(model_dir)
    tiny_llama(seed=1).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    completions = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    files = {"pairs": pairs, "held_out": pairs[:4], "labelled": labelled, "completions": completions}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prose.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("page", of_language("python"))
def test_snippets_run_as_pasted(page, folder):
    namespace: dict = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        code = compile("\n" * (line - 1) + block, str(page), "exec")  # so that a traceback names the page's line
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, on a model of this size
            exec(code, namespace)


@pytest.fixture(scope="module")
def sources():
    """docs/generate.py, which knows the options and the commands."""
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def known_options():
    from dataclasses import fields

    from fastalign import DistillationConfig, OnlineConfig, PreferenceConfig, RewardConfig, SFTConfig

    configs = (PreferenceConfig, SFTConfig, DistillationConfig, RewardConfig, OnlineConfig)
    return {f.name for config in configs for f in fields(config)}


@pytest.fixture(scope="module")
def options_of_runs(sources):
    return set(re.findall(r"^\| `(\w+)`", sources.options("RunOptions"), re.MULTILINE)) | {"method"}


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """(line, words) of every call of `fastalign` in a page's sh blocks."""
    found = []
    for line, block in blocks(page, "sh"):
        calls = (call for call in block.replace("\\\n", " ").splitlines() if call.startswith("fastalign "))
        found += [(line, shlex.split(call, comments=True)[1:]) for call in calls]
    return found


@pytest.mark.parametrize("page", of_language("sh"))
def test_commands_and_their_options_exist(page, sources, known_options, options_of_runs):
    from fastalign.cli import trl
    from fastalign.config.online import POLICY
    from fastalign.losses import ALIASES, PAIRWISE, UNPAIRED

    methods = {"sft", "distill", "reward", *POLICY, *PAIRWISE, *UNPAIRED, *ALIASES}
    for line, words in commands(page):
        name = next((n for n in sources.commands() if words[: len(n.split())] == n.split()), words[0])
        assert name in methods | {*sources.commands(), "info", "--version", "--help"}, f"{page}:{line}: {name}"
        flags = {"--help", "--config"} if name in methods else {"--help"}
        for call in sources.commands().get(name, []):
            flags |= {argument.value for argument in call.args}
        if name in methods | {"train"}:  # `--key value` is `key=value`, and the keys may be TRL's
            flags |= {f"--{key}" for key in known_options | options_of_runs | trl.ONLY_TRL}
        for word in words[1:]:
            key = word.partition("=")[0]
            if word.startswith("--"):
                assert key in flags, f"{page}:{line}: {name} has no {word}"
            elif "=" in word and name in methods | {"train", "plan"}:  # elsewhere it is the value of an option
                assert key in known_options | options_of_runs, f"{page}:{line}: there is no option {key}"


@pytest.mark.parametrize("page", of_language("yaml"))
def test_yaml_files_hold_options_that_exist(page, known_options, options_of_runs):
    for line, block in blocks(page, "yaml"):
        unknown = yaml.safe_load(block).keys() - known_options - options_of_runs
        assert not unknown, f"{page}:{line}: there are no options {unknown}"


def test_blocks_are_of_a_language_that_says_whether_they_run():
    languages = {fence[2] for page in PAGES for fence in FENCE.finditer(page.read_text(encoding="utf-8"))}
    assert languages <= {"python", "py", "sh", "yaml", "json", "text"}


def test_code_fits_the_page_without_scrolling():
    for page in PAGES:
        for language in ("python", "py", "sh"):
            for line, block in blocks(page, language):
                too_long = [text for text in block.splitlines() if len(text) > 88]
                assert not too_long, f"{page}:{line}: {too_long}"
