"""What a run shows and keeps while it trains: the progress bar, and metrics.jsonl."""

from __future__ import annotations

import time
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from fastalign.files import append_metrics

# What the progress bar shows of a logged line, and how.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:.3f}"),
    "rewards/accuracies": ("acc", "{:.2f}"),
    "tokens_per_second": ("tok/s", "{:.0f}"),
    "memory_gb": ("GB", "{:.1f}"),
}


class MetricsWriter(TrainerCallback):
    """Appends every logged line to a JSONL file, with the step, epoch and seconds since the start."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()
        self.before = []  # what was logged before training

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()
        if state.is_world_process_zero and state.global_step == 0:
            self.path.unlink(missing_ok=True)  # a new run; a resumed one goes on where it was
            for record in self.before:
                append_metrics(self.path, record)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            record = {"step": state.global_step, "epoch": state.epoch, "time": round(time.monotonic() - self.start, 3)}
            append_metrics(self.path, {**record, **logs})
            if state.global_step == 0:
                self.before.append({**record, **logs})


class Progress(ProgressCallback):
    """One bar with loss, margin, accuracy, tokens/s and memory, in place of a printed line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs:
            shown = {label: style.format(logs[key]) for key, (label, style) in _SHOWN.items() if key in logs}
            if shown:
                self.training_bar.set_postfix(shown)

    def on_prediction_step(self, args, state, control, **kwargs):
        """No second bar for evaluations: they are short, and their results follow."""
