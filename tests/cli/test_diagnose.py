"""`fastalign diagnose`: its exit status, on runs that a command left."""

from __future__ import annotations

import json
import shutil

from fastalign.cli.main import main
from fastalign.report.diagnostics import DIAGNOSTICS


def test_a_run_with_a_fault_is_1_and_says_what_to_try(trained, tmp_path, capsys):
    folder = shutil.copytree(trained("sft"), tmp_path / "run")
    lines = [{"step": i, "loss": 1.0 if i < 10 else "NaN"} for i in range(12)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["diagnose", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "Loss or gradient is not finite (not_finite)" in said and "loss is nan at step 10" in said
    assert "to try: look at the named rows" in said and "The run has not ended: step 11 of 12" in said


def test_a_sound_run_is_0(trained, capsys):
    folder = trained("sft")
    capsys.readouterr()
    assert main(["diagnose", str(folder)]) == 0
    assert capsys.readouterr().out == f"None of {len(DIAGNOSTICS)} diagnostics fires.\n"


def test_the_table_is_printed(capsys):
    assert main(["diagnose", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(row.title in said and row.remedy in said for row in DIAGNOSTICS)


def test_what_is_no_run_is_refused(refused, tmp_path):
    assert "Which run?" in refused("diagnose")
    assert "is not a folder" in refused("diagnose", tmp_path / "nowhere")
    assert "is not the folder of a run" in refused("diagnose", tmp_path)


def test_what_rows_hold_does_not_steer_the_terminal(tmp_path, capsys):
    row = {"step": 3, "not_finite": "loss\x1b[2J", "prompt": "a"}
    (tmp_path / "nonfinite_rows.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["diagnose", str(tmp_path)]) == 1
    assert "\x1b" not in capsys.readouterr().out
