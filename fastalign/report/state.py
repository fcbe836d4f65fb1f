"""How far a run has come, from the files in its folder: ended, stopped early, or without a word since."""

from __future__ import annotations

import os
from pathlib import Path

from fastalign.errors import InputError
from fastalign.files import read_json, read_metrics
from fastalign.report.rendering import format_number, is_number


def check_run(run_dir: str | os.PathLike) -> Path:
    """The folder of a run.

    Raises:
        InputError: it is no folder, or a folder that no run has written to.
    """
    folder = Path(run_dir).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder of a run, the one that holds metrics.jsonl.")
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "run.json", "nonfinite_rows.jsonl")):
        raise InputError(f"{folder} is not the folder of a run: it holds neither metrics.jsonl nor run.json.")
    return folder


def has_ended(run_dir: str | os.PathLike) -> bool:
    """Whether training came to an end, as its last line says."""
    records = read_metrics(Path(run_dir) / "metrics.jsonl")
    lines = [record for record in records if "loss" in record or "train_runtime" in record]
    return bool(lines) and "train_runtime" in lines[-1]


def state_of(run_dir: str | os.PathLike) -> str:
    """One or two sentences on a run that has not reached its last step; empty for one that has."""
    folder = Path(run_dir)
    records, options = read_metrics(folder / "metrics.jsonl"), read_json(folder / "run.json")
    step, epoch = (max((r[k] for r in records if is_number(r.get(k))), default=0) for k in ("step", "epoch"))
    steps, epochs = options.get("max_steps", -1), options.get("num_train_epochs", 0)
    by_steps = is_number(steps) and steps > 0
    far = f"step {format_number(step)} of {format_number(steps)}" if by_steps else (
        f"step {format_number(step)}, epoch {format_number(epoch)} of {format_number(epochs)}"
    )  # fmt: skip
    if has_ended(folder):
        reached = step >= steps if by_steps else not is_number(epochs) or epoch >= epochs - 0.01
        return "" if reached else f"Training ended early, at {far}."
    why = "It is running, or it was stopped."
    if (folder / "nonfinite_rows.jsonl").is_file():
        why = "It was stopped: a loss or a gradient was not finite, see nonfinite_rows.jsonl."
    elif (folder / "traceback.txt").is_file():
        why = "It was stopped by an error, see traceback.txt."
    return f"The run has not ended: {far}. {why}"
