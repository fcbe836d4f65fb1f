"""fastalign's own files: strict JSON lines, atomic writes, lines cut off by a killed run, and tensors by key."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastalign.errors import DataError
from fastalign.files import (
    KEY_BYTES,
    KeyedTensors,
    append_metrics,
    atomic_write,
    read_json,
    read_jsonl,
    read_metrics,
    write_json,
    write_jsonl,
    write_keyed,
    write_text,
)


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_metrics_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 0, "loss": 0.6931471805599453, "eval_loss": None}, {"step": 10, "note": "naïve\u2028\n"}]
    for record in records:
        append_metrics(path, record)
    assert read_metrics(path) == records
    assert len(path.read_bytes().splitlines()) == 2


def test_each_record_is_on_disk_when_append_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        append_metrics(path, {"step": step})
        assert path.read_bytes().endswith(b'{"step": %d}\n' % step)


def test_non_finite_values_are_strict_json_and_come_back_as_floats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"loss": math.nan, "a": math.inf, "b": -math.inf, "c": np.float32("nan")})
    json.loads(path.read_text(), parse_constant=refuse_constant)
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"]) and math.isnan(record["c"])
    assert record["a"] == math.inf and record["b"] == -math.inf


def test_bare_nan_of_other_writers_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n')
    assert math.isnan(read_metrics(path)[0]["loss"])


def test_integers_beyond_every_float_are_infinite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"a": 1{"0" * 299}, "b": -1{"0" * 5000}}}\n')
    assert read_metrics(path) == [{"a": 10**299, "b": -math.inf}]


def test_scalars_of_numpy_and_torch_become_numbers_and_other_objects_strings(tmp_path):
    path = tmp_path / "config.json"
    write_json(
        path,
        {
            "a": np.float32(0.5),
            "b": torch.tensor(3),
            "c": torch.tensor(0.25, dtype=torch.bfloat16),
            "d": Path("x/y"),
            "e": torch.bfloat16,
            "f": {"q", "k"},
            "g": (1, 2),
            "h": True,
        },
    )
    expected = {"a": 0.5, "b": 3, "c": 0.25, "d": str(Path("x", "y")), "e": "torch.bfloat16"}
    assert read_json(path) == expected | {"f": ["k", "q"], "g": [1, 2], "h": True}


def test_lone_surrogates_survive(tmp_path):
    path = tmp_path / "samples.jsonl"
    append_metrics(path, {"after": "\ud83d broken"})
    assert read_jsonl(path) == [{"after": "\ud83d broken"}]


def test_half_a_last_line_is_left_out_without_a_warning(tmp_path, recwarn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "loss": 0.\xc3')
    assert read_metrics(path) == [{"step": 1}]
    assert not recwarn.list


def test_append_after_half_a_line_loses_nothing_else(tmp_path, recwarn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    append_metrics(path, {"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert not recwarn.list


def test_append_keeps_a_whole_last_line_that_lacks_its_line_break(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    append_metrics(path, {"step": 3})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{", "[1]", "3", '"x"', "null", "[" * 100_000])
def test_damage_before_the_last_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n\n{line}\n{{"step": 2}}\n')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: .* line 3\."):
        assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_missing_files_are_empty(tmp_path):
    assert read_metrics(tmp_path / "no.jsonl") == []
    assert read_json(tmp_path / "no.json") == {}


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b"[" * 100_000, b"[1]"])
def test_damaged_json_is_one_clear_error(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"config\.json .* mend the file or delete it"):
        read_json(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"beta": 0.1})

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"beta": 0.2})
    assert read_json(path) == {"beta": 0.1}
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_readers_never_see_a_file_half_written(tmp_path):
    """The new content appears under another inode: a reader who opened the old file reads it to its end."""
    path = tmp_path / "report.html"
    write_text(path, "old" * 100_000)  # more than a reader buffers
    with path.open() as reader:
        assert reader.read(3) == "old"
        write_text(path, "new")
        assert reader.read() == "old" * 99_999
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_written_files_follow_the_umask(tmp_path):
    """A page made with owner-only rights could not be served or read by a colleague."""
    path = tmp_path / "report.html"
    write_text(path, "x")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_lines_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "naïve\u2028\n", "n": 1}, {"text": "", "n": math.inf}]
    write_jsonl(path, [{"old": 1}])
    write_jsonl(path, rows)
    assert read_metrics(path) == rows
    assert "naïve" in path.read_text(encoding="utf-8")  # text, not escapes

    def interrupted():
        yield rows[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, interrupted())
    assert read_metrics(path) == rows
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_block_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "weights"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half of the new")
        assert temporary.parent == tmp_path  # a rename to another file system would not be atomic
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "weights"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the block that ended last
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]


# Tensors by key

KEYS = [bytes([n] * KEY_BYTES) for n in range(4)]
LENGTHS = [2, 0, 3, 0]  # an empty one inside, and one at the end


@pytest.fixture
def keyed(tmp_path):
    """The path of a file of two names, and what was written to it."""
    values = {
        "logprobs": [np.arange(n, dtype=np.float32) + i for i, n in enumerate(LENGTHS)],
        "indices": [np.full((n, 5), i, dtype=np.int32) for i, n in enumerate(LENGTHS)],
    }
    path = tmp_path / "new" / "folder" / "values.safetensors"
    write_keyed(path, KEYS, values, {"temperature": "2.0"})
    return path, values


def test_arrays_come_back_by_their_keys(keyed):
    path, values = keyed
    stored = KeyedTensors(path, ["logprobs", "indices"])
    assert stored.metadata == {"temperature": "2.0"}
    assert KEYS[3] in stored and bytes([9] * KEY_BYTES) not in stored
    for name, arrays in values.items():
        every = stored.read_all(name)
        assert list(every) == KEYS
        for key, array in zip(KEYS, arrays, strict=True):
            for found in (stored.read(name, key), every[key]):
                assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_layout_on_disk_is_that_of_the_docstring(keyed):
    path, values = keyed
    tensors = load_file(path)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "keys": (torch.uint8, (4, KEY_BYTES)), "offsets": (torch.int64, (5,)),
        "logprobs": (torch.float32, (5,)), "indices": (torch.int32, (5, 5)),
    }  # fmt: skip
    assert tensors["offsets"].tolist() == [0, 2, 2, 5, 5]
    assert tensors["logprobs"].tolist() == [x for array in values["logprobs"] for x in array]


def damage_bytes(path):
    path.write_bytes(path.read_bytes()[:-8])


def damage_values(path):
    tensors = load_file(path)
    save_file({**tensors, "logprobs": tensors["logprobs"][:-1].clone()}, path)


def damage_keys(path):
    tensors = load_file(path)
    save_file({**tensors, "keys": tensors["keys"][:, :8].clone()}, path)


def damage_offsets(path):
    tensors = load_file(path)
    save_file({**tensors, "offsets": tensors["offsets"][1:].clone()}, path)


@pytest.mark.parametrize("damage", [damage_bytes, damage_values, damage_keys, damage_offsets, Path.unlink])
def test_a_damaged_file_is_one_clear_error(keyed, damage):
    path, _ = keyed
    damage(path)
    with pytest.raises(DataError, match=r"values\.safetensors cannot be read \(.+\)$"):
        KeyedTensors(path, ["logprobs", "indices"])


def test_a_missing_name_is_one_clear_error(keyed):
    with pytest.raises(DataError, match="cannot be read"):
        KeyedTensors(keyed[0], ["gradients"])
