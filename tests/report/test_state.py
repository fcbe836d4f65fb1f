"""How far a run has come."""

from __future__ import annotations

import json

import pytest

from fastalign.report.state import has_ended, state_of

END = {"step": 10, "epoch": 1.0, "train_runtime": 1.0}


@pytest.fixture
def run(tmp_path):
    def run(*lines, **options):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "run.json").write_text(json.dumps(options))
        return tmp_path

    return run


def test_a_run_that_reached_its_end_needs_no_word(run):
    assert state_of(run({"step": 10, "loss": 1.0}, END, max_steps=10)) == ""
    assert state_of(run({"step": 10, "loss": 1.0}, END, max_steps=-1, num_train_epochs=1)) == ""
    assert has_ended(run(END, {"step": 10, "eval_loss": 1.0}))


def test_others_say_how_far_they_are(run):
    folder = run({"step": 4, "epoch": 0.4, "loss": 1.0}, max_steps=-1, num_train_epochs=3)
    assert state_of(folder).startswith(
        "The run has not ended: step 4, epoch 0.4 of 3. It is running, or it was stopped."
    )
    assert state_of(run(END, max_steps=30)) == "Training ended early, at step 10 of 30."
    assert not has_ended(run(END, {"step": 11, "loss": 1.0}))  # it was gone on with
    (folder / "traceback.txt").touch()
    assert "traceback.txt" in state_of(folder)
    (folder / "nonfinite_rows.jsonl").touch()
    assert "was not finite" in state_of(folder)


def test_a_folder_without_numbers(run):
    assert state_of(run({"step": "x", "loss": "y"})).startswith("The run has not ended: step 0")
