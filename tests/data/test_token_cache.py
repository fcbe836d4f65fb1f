"""Tokens on disk: found again with the same rows, tokenizer and options, and with nothing else."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from fastalign.data import token_cache, token_keys, tokenization
from fastalign.data.loading import Source
from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError

PAIRS = [{"prompt": f"the {n}", "chosen": f" dog {n}", "rejected": " fox"} for n in range(6)]
TURN = {"role": "user", "content": "the"}
ANSWERS = [{"role": "assistant", "content": "dog"}, TURN, {"role": "assistant", "content": "fox"}]


@pytest.fixture(autouse=True)
def _few_rows_are_many(monkeypatch):
    monkeypatch.setattr(token_keys, "MIN_ROWS", 1)
    monkeypatch.setattr(token_keys, "MIN_BYTES", 1)
    monkeypatch.setattr(tokenization, "BATCH_ROWS", 2)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


@pytest.fixture
def made(monkeypatch):
    """Counts how often tokens are made."""
    calls, work = [], tokenization._tokenized
    monkeypatch.setattr(tokenization, "_tokenized", lambda *args, **kwargs: calls.append(1) or work(*args, **kwargs))
    return calls


def same(one, other) -> bool:
    return one[0].to_list() == other[0].to_list() and one[0].features == other[0].features and one[1] == other[1]


@pytest.mark.parametrize(
    "rows", [PAIRS, [{"prompt": [TURN], "completion": ANSWERS[2:] if n else ANSWERS} for n in range(5)]]
)
@pytest.mark.parametrize("wanted", [None, "labelled"])
def test_the_second_call_reads_the_same_tokens(rows, wanted, tokenizer, tmp_path, made):
    wanted = wanted if rows is PAIRS else None
    plain = tokenize(rows, tokenizer, wanted=wanted)
    first, second = (tokenize(rows, tokenizer, wanted=wanted, cache_dir=tmp_path) for _ in range(2))
    assert same(plain, first) and same(plain, second)
    assert len(made) == 2 and second[0].cache_files  # the file is mapped, and not read into memory
    assert {path.suffix for path in tmp_path.iterdir()} == {".arrow", ".json"}


def test_everything_that_decides_on_tokens_is_in_the_key(file, tokenizer, byte_level, tmp_path, made):
    def new(rows=file, tokenizer=tokenizer, **options):
        before = len(made)
        tokenize(rows, tokenizer, cache_dir=tmp_path / "cache", **options)
        return len(made) > before

    assert new() and not new()
    assert not new(num_proc=2) and not new(Source(str(file)))
    assert new(max_length=100) and new(on_truncate="drop") and new(on_invalid="drop") and new(wanted="pairs")
    assert new(allow_empty_prompt=True) and new(apply_chat_template=True)
    assert new(Source(str(file), {"prompt": "chosen", "chosen": "prompt"}))
    assert new([{"path": str(file), "weight": 2}]) and new([str(file), str(file)])
    other = byte_level()
    assert new(tokenizer=other)
    other.chat_template = "{{ messages }}"
    assert new(tokenizer=other) and not new(tokenizer=other)
    other.eos_token = "<s>"
    assert new(tokenizer=other)
    other.add_tokens(["dog"])
    assert new(tokenizer=other)
    data = datasets.Dataset.from_list(PAIRS)
    assert new(data) and not new(data.select(range(6))) and new(data.select([1, 0])) and not new(PAIRS)
    file.write_text(file.read_text().replace("dog 3", "dog 4"))
    assert new()


def test_code_of_other_origin_and_random_tokens_are_not_stored(byte_level, tmp_path):
    class Own(type(byte_level())):
        """May tokenise in its own way."""

    tokenize(PAIRS, Own(tokenizer_object=byte_level().backend_tokenizer, eos_token="<s>"), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "json", "report"])
def test_a_damaged_entry_is_found_and_written_again(damage, tokenizer, tmp_path, made, caplog):
    good = tokenize(PAIRS, tokenizer, cache_dir=tmp_path)
    (tokens,), (about,) = tmp_path.glob("*.arrow"), tmp_path.glob("*.json")
    content = bytearray(tokens.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        tokens.write_bytes(content)
    elif damage == "cut":
        tokens.write_bytes(content[:-40])
    else:
        about.write_text("{" if damage == "json" else about.read_text().replace("rows_kept", "rows"))
    with caplog.at_level("WARNING", "fastalign"):
        again = tokenize(PAIRS, tokenizer, cache_dir=tmp_path)
    assert same(good, again) and len(made) == 2 and "damaged" in caplog.text
    assert same(good, tokenize(PAIRS, tokenizer, cache_dir=tmp_path)) and len(made) == 2


def test_a_folder_that_cannot_be_written_costs_no_run(tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level("WARNING", "fastalign"):
        tokens, _ = tokenize(PAIRS, tokenizer, cache_dir=tmp_path / "file")
    assert len(tokens) == 6 and "cannot be stored" in caplog.text


def test_nothing_is_stored_of_rows_that_are_refused_or_change_meanwhile(file, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    with pytest.raises(DataError, match="longer than max_length"):
        tokenize(file, tokenizer, max_length=3, cache_dir=folder)
    assert not list(folder.iterdir())
    work = tokenization._tokenized

    def change_then_work(*args, **kwargs):
        file.write_text(file.read_text().replace("fox", "box"))
        os.utime(file, (1, 1))
        return work(*args, **kwargs)

    monkeypatch.setattr(tokenization, "_tokenized", change_then_work)
    tokenize(file, tokenizer, cache_dir=folder)
    assert not list(folder.glob("*.json"))


def test_entries_that_are_long_unused_are_removed(tokenizer, tmp_path):
    old, killed, fresh = tmp_path / "a.arrow", tmp_path / ".b.tmp", tmp_path / "c.json"
    for path, days in ((old, token_cache.UNUSED_DAYS + 1), (killed, 2), (fresh, 2)):
        path.write_text("")
        os.utime(path, (time.time() - days * 86400,) * 2)
    tokenize(PAIRS, tokenizer, cache_dir=tmp_path)
    assert not old.exists() and not killed.exists() and fresh.exists()


def test_two_processes_may_write_one_entry_at_a_time(tmp_path, file):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import make_byte_level
from fastalign.data import token_keys, tokenize
token_keys.MIN_BYTES = 1
tokens, report = tokenize({str(file)!r}, make_byte_level(), cache_dir={str(tmp_path / "cache")!r})
print(hash(str(tokens.to_list()) + str(report)))
""")
    env = os.environ | {"PYTHONHASHSEED": "0"}
    runs = [subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    outputs = {run.communicate()[0] for run in runs}
    assert len(outputs) == 1 and all(run.returncode == 0 for run in runs) and outputs != {""}
    assert len(list((tmp_path / "cache").iterdir())) == 2
