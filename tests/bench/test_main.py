"""The bench's command line: the list of what there is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench.suites import divergences


def test_the_list_names_every_suite_case_and_implementation(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--list"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    for name, suite in bench.SUITES.items():
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
        block = lines[start + 1 :]
        end = next(i for i, line in enumerate(block) if line.startswith("  implementations: "))
        assert block[end] == "  implementations: " + ", ".join(suite.IMPLEMENTATIONS)
        listed = [line.split() for line in block[:end]]
        assert {words[0] for words in listed} == {*suite.CASES, *suite.QUICK}
        assert {words[0] for words in listed if words[1:] == ["(quick)"]} == set(suite.QUICK)


def test_a_reader_that_stops_reading_is_no_error(monkeypatch):
    """`python -m bench --list | head`"""
    read_end, write_end = os.pipe()
    os.close(read_end)
    monkeypatch.setattr("sys.argv", ["bench", "--list"])
    with os.fdopen(write_end, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert bench.main() is None
        assert os.fstat(stdout.fileno()).st_rdev == Path(os.devnull).stat().st_rdev, "what is left has nowhere to go"


def test_without_a_command_it_shows_its_help(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench"])
    bench.main()
    assert "python -m bench" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.parser().parse_args(["nothing"])


def test_what_was_left_out_is_named(monkeypatch, tmp_path, record):
    monkeypatch.setattr(divergences, "IMPLEMENTATIONS", dict.fromkeys(("ours", "theirs", "another")))
    monkeypatch.setattr(divergences, "run", lambda case, *_: [record(case=case, skipped={"another": "not here"})])
    run = ["divergences", "--case", "jsd*mask0", "--out", str(tmp_path), "--only", "ours", "another"]
    bench.run_suite("divergences", bench.parser().parse_args(run))
    (saved,) = bench.load(tmp_path / "divergences.json")
    assert saved.skipped == {"another": "not here", "theirs": "left out (--only)"}
    assert set(divergences.IMPLEMENTATIONS) == {"ours", "another"}


def test_a_case_of_which_nothing_can_be_measured_keeps_its_records(monkeypatch, tmp_path, record, capsys):
    run = ["divergences", "--case", "jsd*mask0", "--out", str(tmp_path)]
    for found in ([record(case="jsd-float32-2048x576x49152-mask0")], []):
        monkeypatch.setattr(divergences, "run", lambda *_, found=found: found)
        bench.run_suite("divergences", bench.parser().parse_args(run))
    assert len(bench.load(tmp_path / "divergences.json")) == 1
    assert "nothing could be measured of jsd" in capsys.readouterr().err
