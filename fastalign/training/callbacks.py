"""What happens around the training loop: metrics.jsonl, the progress bar, and a reference that follows the model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fastalign.files import append_metrics, read_metrics, write_jsonl
from fastalign.models.snapshot import ReferenceWeights
from fastalign.training.watch import Watch

# Metric -> its label and format in the progress bar.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:.3f}"),
    "rewards/accuracies": ("acc", "{:.2f}"),
    "tokens_per_second": ("tok/s", "{:.0f}"),
    "memory_gb": ("GB", "{:.1f}"),
}


def install_callbacks(trainer: Trainer) -> MetricsWriter:
    """Gives a trainer `MetricsWriter`, `Watch` and `Progress` instead of the Trainer's own bar and printed lines.

    Returns:
        The writer, which also has the clock of the run.
    """
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    writer = MetricsWriter(Path(str(trainer.args.output_dir)) / "metrics.jsonl")
    trainer.add_callback(writer)
    trainer.add_callback(Watch())
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress())
    return writer


class MetricsWriter(TrainerCallback):
    """Appends every logged line to a JSONL file, with the step, the epoch and the seconds of training so far.

    Nothing is written before training begins, so that an evaluation alone leaves the file of an older run as it is.

    Args:
        path: The file. A new run replaces it. A resumed run cuts it after the step that it goes on from, and appends.
    """

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()
        # Lines of an evaluation before training. They belong to the run, which writes them when it begins.
        self.before: list[dict[str, Any]] = []
        self.begun = False
        self.ended: float | None = None  # seconds when training ended

    @property
    def seconds(self) -> float:
        """Seconds of training, those of the runs that this one goes on from included. They stop at its end."""
        return time.monotonic() - self.start if self.ended is None else self.ended

    def on_train_begin(self, args, state, control, **kwargs):
        """Begins the file: the lines of an evaluation before, or what an earlier run had logged up to this step."""
        lines = self.before
        if state.global_step > 0:
            lines = [line for line in read_metrics(self.path) if _is_before(line, state.global_step)]
        self.start = time.monotonic() - (lines[-1].get("time", 0) if state.global_step > 0 and lines else 0)
        self.begun, self.ended = True, None
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(self.path, lines)

    def on_train_end(self, args, state, control, **kwargs):
        """Stops the clock, so that the file, the report and the summary give one time."""
        self.ended = self.seconds

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Appends the line."""
        if not logs or not state.is_world_process_zero:
            return
        record = {"step": state.global_step, "epoch": state.epoch, "time": round(self.seconds, 3), **logs}
        if state.global_step == 0:
            self.before.append(record)
        if self.begun:
            append_metrics(self.path, record)


def _is_before(line: dict[str, Any], step: int) -> bool:
    """Whether a resumed run keeps a line: it is of an earlier step or this one, and not the summary of a run's end."""
    return line.get("step", 0) <= step and "train_runtime" not in line


class Progress(ProgressCallback):
    """One bar with loss, margin, accuracy, tokens per second and memory, instead of a printed line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows the metrics beside the bar."""
        if self.training_bar is not None and logs:
            shown = {label: style.format(logs[key]) for key, (label, style) in _SHOWN.items() if key in logs}
            if shown:
                self.training_bar.set_postfix(shown)

    def on_prediction_step(self, args, state, control, *_, **kwargs):
        """Shows no second bar for evaluations: they are short, and their results follow."""


class MoveReference(TrainerCallback):
    """Moves the reference towards the model while it is trained (TR-DPO, arXiv:2404.09656).

    Args:
        weights: The reference.
        share: The share of the model in each move, from 0 to 1.
        every: Optimiser steps between two moves.
    """

    def __init__(self, weights: ReferenceWeights, share: float, every: int):
        self.weights, self.share, self.every = weights, share, every

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the reference if a move is due after this step."""
        if state.global_step % self.every == 0:
            self.weights.move_towards_model(self.share)
