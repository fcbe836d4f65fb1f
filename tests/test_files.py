"""Run-folder files: strict JSON lines, atomic writes, tolerance of lines cut off by a killed run."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalign.errors import DataError
from fastalign.files import append_metrics, read_json, read_jsonl, read_metrics, write_json, write_text


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
    expected = {"a": 0.5, "b": 3, "c": 0.25, "d": os.path.join("x", "y"), "e": "torch.bfloat16"}
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
    assert os.listdir(tmp_path) == ["config.json"]


def test_readers_never_see_a_file_half_written(tmp_path):
    """The new content appears under another inode: a reader who opened the old file reads it to its end."""
    path = tmp_path / "report.html"
    write_text(path, "old" * 100_000)  # more than a reader buffers
    with open(path) as reader:
        assert reader.read(3) == "old"
        write_text(path, "new")
        assert reader.read() == "old" * 99_999
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.html"]


def test_written_files_follow_the_umask(tmp_path):
    """A page made with owner-only rights could not be served or read by a colleague."""
    path = tmp_path / "report.html"
    write_text(path, "x")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
