"""What happens beside the training loop: metrics.jsonl, the progress bar, and a reference that follows the model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fastalign.files import append_metrics
from fastalign.models.snapshot import ReferenceWeights

# Metric -> its label and format in the progress bar.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:.3f}"),
    "rewards/accuracies": ("acc", "{:.2f}"),
    "tokens_per_second": ("tok/s", "{:.0f}"),
    "memory_gb": ("GB", "{:.1f}"),
}


def install_callbacks(trainer: Trainer) -> None:
    """Gives a trainer `MetricsWriter` and `Progress` instead of the Trainer's own bar and printed lines."""
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    trainer.add_callback(MetricsWriter(Path(str(trainer.args.output_dir)) / "metrics.jsonl"))
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress())


class MetricsWriter(TrainerCallback):
    """Appends every logged line to a JSONL file, with the step, the epoch and the seconds since the start.

    Args:
        path: The file. A new run replaces it, and a resumed run appends to it.
    """

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()
        # Lines of an evaluation before training. They belong to the run, whose start clears the file.
        self.before: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Clears the file for a new run, except for what was logged just before."""
        self.start = time.monotonic()
        if state.is_world_process_zero and state.global_step == 0:
            self.path.unlink(missing_ok=True)
            for record in self.before:
                append_metrics(self.path, record)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Appends the line."""
        if logs and state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            record = {"step": state.global_step, "epoch": state.epoch, "time": round(time.monotonic() - self.start, 3)}
            append_metrics(self.path, {**record, **logs})
            if state.global_step == 0:
                self.before.append({**record, **logs})


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
