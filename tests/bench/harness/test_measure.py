"""The rules of the bench: checked before timed, interleaved, and read back as written."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from bench.harness.measure import (
    FLOOR,
    Checked,
    Measurement,
    Missing,
    WrongResult,
    able,
    interleaved,
    load,
    measure,
    peak_extra_memory,
    save,
    timed,
    too_slow,
)

ONE = Measurement(
    suite="ops",
    case="frozen-float32-4x2x8-mask0",
    sizes={"n": 4, "h": 2, "v": 8},
    implementation="eager",
    median_s=0.2,
    q1_s=0.1,
    q3_s=0.3,
    runs=5,
    peak_extra_bytes=1 << 20,
    errors={"logprobs": 1e-6},
    checked="4 of 4 scored rows",
    device="cpu",
    threads=1,
    load=0.5,
    versions={"torch": "2.13"},
    commit="abc",
    date="2026-01-01T00:00:00Z",
)


def test_records_come_back_as_written(tmp_path):
    path = tmp_path / "new" / "ops.json"
    written = [ONE, replace(ONE, implementation="other", peak_extra_bytes=None)]
    save(written, path)
    assert load(path) == written
    assert [entry.name for entry in path.parent.iterdir()] == ["ops.json"]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.json"
    record = asdict(ONE)
    record.pop("errors")
    path.write_text(json.dumps([record]))
    with pytest.raises(ValueError, match="errors"):
        load(path)


def test_records_of_before_a_field_was_added_are_read(tmp_path):
    path = tmp_path / "x.json"
    old = asdict(ONE)
    del old["skipped"], old["losses"]
    path.write_text(json.dumps([old]))
    assert load(path) == [ONE]
    path.write_text(json.dumps([old | {"colour": "red"}]))
    with pytest.raises(ValueError, match="colour"):
        load(path)


@pytest.mark.parametrize("errors", [{}, {"logprobs": float("nan")}])
def test_no_record_without_a_check(errors):
    with pytest.raises(ValueError, match="check it before"):
        replace(ONE, errors=errors)


def test_no_record_with_quartiles_out_of_order():
    with pytest.raises(ValueError, match="quartiles"):
        replace(ONE, q1_s=0.25)


def test_runs_are_interleaved():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "AB"}
    seconds = interleaved(runs, 3)
    assert order == ["A", "B"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3}


def test_every_run_is_checked_first_and_a_wrong_one_never_timed(capsys):
    ran = []

    def check(name, outputs):
        ran.append(f"check {name}")
        if name == "wrong":
            raise WrongResult("logprobs is off by 1")
        return Checked({"logprobs": 0.0}, "all")

    def candidate(name):
        return lambda: ran.append(name) or {"logprobs": torch.zeros(1)}

    candidates = {name: candidate(name) for name in ("right", "wrong")} | {"absent": "it is not here"}
    (record,) = measure("ops", "case", {"v": 8}, candidates, check, lambda name: 7, rounds=2)
    assert ran == ["right", "check right", "wrong", "check wrong", "right", "right"]
    assert (record.implementation, record.runs, record.peak_extra_bytes) == ("right", 2, 7)
    assert record.skipped == {"absent": "it is not here", "wrong": "wrong: logprobs is off by 1"}
    assert "REFUSED wrong: logprobs is off by 1" in capsys.readouterr().err


def test_what_cannot_run_is_told_from_what_can(capsys):
    def part(name, fraction):
        if name == "absent":
            raise Missing("it is not here")
        return torch.zeros(1).add if name == "faulty" else dict

    able_ones = able(["fine", "absent", "faulty"], part, limit_s=60)
    assert able_ones["fine"] is dict and able_ones["absent"] == "it is not here"
    assert able_ones["faulty"].startswith("it raised TypeError: ")
    slow = able(["slow", FLOOR], part, limit_s=0)
    assert slow["slow"].endswith("over half the limit of 0 s (--limit)") and slow[FLOOR] is dict
    said = capsys.readouterr().err
    assert [line.split(":")[0].split()[:2] for line in said.splitlines()] == [
        ["skipped", n] for n in ("absent", "faulty", "slow")
    ]


@pytest.mark.parametrize(
    ("seconds", "tried", "why"),
    [
        ({16: 1}, [16], None),  # 16 s
        ({16: 2, 4: 5}, [16, 4], None),  # 32 s, and 20 s
        ({16: 9, 4: 9}, [16, 4], None),  # nearly as long on few rows as on many
        ({16: 11}, [16], "1/16 of the rows took over half the limit of 20 s (--limit)"),
        ({16: 3, 4: 12}, [16, 4], "1/4 of the rows took over half the limit of 20 s (--limit)"),
    ],
)
def test_what_few_rows_tell_of_all(seconds, tried, why, monkeypatch):
    seen = []
    monkeypatch.setattr("bench.harness.measure.timed", lambda fraction, _: seen.append(fraction) or seconds[fraction])
    assert too_slow(lambda fraction: fraction, 20) == why
    assert seen == tried


@pytest.mark.parametrize(("took", "limit", "counts"), [((45, 3), 5, 3), ((85, 3), 5, 85), ((85, 3), math.inf, 3)])
def test_a_first_run_that_no_compiling_explains_is_enough(took, limit, counts, monkeypatch):
    now, rest = [0.0], iter(took)
    monkeypatch.setattr("bench.harness.measure.time.perf_counter", lambda: now[0])
    assert timed(lambda: now.__setitem__(0, now[0] + next(rest)), limit) == counts


def test_an_error_without_a_word_does_not_end_the_run():
    def silent():
        raise AssertionError

    assert able(["silent"], lambda *_: silent, 60) == {"silent": "it raised AssertionError: "}


def test_peak_memory_sees_what_is_freed_again():
    size = 64 << 20
    extra = peak_extra_memory(lambda: torch.ones(size, dtype=torch.uint8))
    counting = 1 << 20  # the kernel keeps resident pages in per-CPU batches: a reading may lag by some of them
    assert size - counting <= extra < 1.5 * size
