"""Stops a run before a loss or a gradient that is not finite reaches the weights.

A single NaN in an update makes every weight NaN, and everything after it is lost. So each loss and each gradient is
checked before the optimiser step.

- At once, on a CPU: a check costs nothing there, so the run stops inside the step that failed.
- Later, on a GPU: to read a number off a GPU waits for everything before it. The result of each check therefore stays
  on the device. It makes the optimiser skip this step and all later ones, exactly as a gradient scaler would
  (`found_inf` of fused optimisers). It is read when a line is logged or something is saved, at most 10 steps later.
- With several processes, before each optimiser step: they tell each other what failed, so that all of them stop. The
  others would wait forever for one that stops alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from fastalign.data.processes import gather_objects, largest_of_processes
from fastalign.errors import TrainingError
from fastalign.files import write_jsonl

FILE_NAME = "nonfinite_rows.jsonl"
_READ_EVERY = 10  # optimiser steps between two reads of a GPU's checks
_MOST_SKIPPED = 10  # steps that the gradient scaler of fp16 may skip in a row


@dataclass
class _Check:
    """One check that was not read yet.

    Attributes:
        step: The optimiser step that it is of.
        what: What was checked, "loss" or "gradient".
        rows: The rows that this process computed it from.
        failed: () bool, of this process.
        anywhere: () bool, whether it failed in any process; None until they have told each other.
    """

    step: int
    what: str
    rows: list[dict]
    failed: Tensor
    anywhere: Tensor | None = None


class FiniteGuard(TrainerCallback):
    """Checks every loss and every gradient; `TrainingError` if one is not finite.

    Args:
        trainer: The trainer. Its tokenizer and output folder serve the report of the rows.
        at_once: Whether each check is read at once. None: on a CPU.
    """

    def __init__(self, trainer: Any, at_once: bool | None = None):
        self.trainer = trainer
        self.at_once = trainer.args.device.type == "cpu" if at_once is None else at_once
        self.alone = trainer.args.world_size <= 1
        self.checks: list[_Check] = []
        self.rows: list[dict] = []  # of all micro-batches of the coming optimiser step
        self.stopped: Tensor | None = None  # () float32, 1 once a check has failed
        self.skipped = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Forgets a failure of an earlier call of `train`."""
        self.checks, self.rows, self.stopped, self.skipped = [], [], None, 0

    def check_loss(self, loss: Tensor, rows: list[dict]) -> None:
        """Checks the loss of one micro-batch before its backward pass."""
        self.rows += rows
        self._add("loss", rows, ~torch.isfinite(loss.detach()))

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Checks the gradients, and lets the optimiser skip the step if a check failed that was not read yet."""
        rows, self.rows = self.rows, []
        gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]  # pyright: ignore[reportOptionalMemberAccess]
        # With fp16 the scaler looks for inf in the gradients and skips the step, see `on_optimizer_step`.
        if gradients and not args.fp16:
            # The largest magnitude of each gradient is NaN or inf exactly if one of its elements is.
            parts = [part for part in gradients if part.numel()] or [torch.zeros(1)]  # a shard may be empty
            norms = torch._foreach_norm(parts, float("inf"))  # pyright: ignore[reportPrivateImportUsage] - no public name
            largest = torch.stack([norm.to(args.device) for norm in norms])
            self._add("gradient", rows, ~torch.isfinite(largest).all())
        self._agree()
        if args.fp16 or not gradients:
            return
        inner: Any = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
        if getattr(inner, "_step_supports_amp_scaling", False):
            inner.found_inf = self.stopped
        else:  # this optimiser cannot skip a step on the device
            self.read()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Counts the steps that the gradient scaler of fp16 skipped in a row.

        Raises:
            TrainingError: There were too many.
        """
        self.skipped = self.skipped + 1 if getattr(optimizer, "step_was_skipped", False) else 0
        if self.skipped >= _MOST_SKIPPED:
            raise TrainingError(
                f"Step {state.global_step + 1}: the gradients overflowed float16 in {self.skipped} steps in a row, so "
                "none of these steps changed a weight: use bf16, or float32 (fp16=False)."
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Reads the checks if their results are due. The Trainer logs, evaluates and saves after this."""
        due = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if due or state.global_step % _READ_EVERY == 0:
            self.read()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Reads the checks, since a checkpoint may follow."""
        self.read()

    def on_train_end(self, args, state, control, **kwargs):
        """Reads the checks, since the caller will save the model."""
        self.read()

    def read(self) -> None:
        """Reads the checks that ran since the last call. On a GPU the host waits for them here.

        Raises:
            TrainingError: A check failed. The error is about the first one.
        """
        checks, self.checks = self.checks, []
        if not checks or not torch.stack([_anywhere(check) for check in checks]).any():
            return
        check = next(check for check in checks if _anywhere(check).item())
        step, what = check.step, check.what
        # The gradients of all processes are averaged, so any row may have spoilt one. A loss is of its process.
        suspects = check.rows if what == "gradient" or check.failed.item() else []
        rows = [row for of_process in gather_objects(suspects) for row in of_process]
        path = Path(str(self.trainer.args.output_dir)) / FILE_NAME
        records = [self._record(step, what, row) for row in rows]
        if self.trainer.args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, records)
        first = repr(records[0]["prompt"][:60]) if records else "?"
        raise TrainingError(
            f"Step {step}: the {what} is not finite (NaN or inf) on {len(records)} rows, the first of which has the "
            f"prompt {first}; the weights stay as after step {step - 1}, and the rows are in {path}: look at these "
            "rows, lower the learning rate, or set max_grad_norm=1.0 if it is off."
        )

    def _add(self, what: str, rows: list[dict], failed: Tensor) -> None:
        check = _Check(self.trainer.state.global_step + 1, what, rows, failed)
        self.checks.append(check)
        if self.alone:
            self._count(failed)

    def _agree(self) -> None:
        """Lets every process know which of the new checks have failed in any of them."""
        fresh = [check for check in self.checks if check.anywhere is None]
        if self.alone or not fresh:
            return
        failed = largest_of_processes(torch.stack([check.failed for check in fresh]).float())
        for check, anywhere in zip(fresh, failed.bool(), strict=True):
            check.anywhere = anywhere
        self._count(failed.max())

    def _count(self, failed: Tensor) -> None:
        if self.at_once:
            self.read()
        elif self.stopped is None:
            self.stopped = failed.float()
        else:
            self.stopped = torch.maximum(self.stopped, failed.float())

    def _record(self, step: int, what: str, row: dict) -> dict[str, Any]:
        decode = self.trainer.processing_class.decode
        return {
            "step": step,
            "not_finite": what,
            "prompt": decode(row["prompt_ids"]),
            "completions": [decode(ids) for ids in row["completion_ids"]],
            "prompt_ids": list(row["prompt_ids"]),
            "completion_ids": [list(ids) for ids in row["completion_ids"]],
        }


def _anywhere(check: _Check) -> Tensor:
    """() bool: whether a check has failed in any process."""
    return check.failed if check.anywhere is None else check.anywhere


def _local(gradient: Tensor) -> Tensor:
    """The part of a gradient that lies on this process, where FSDP shards it."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
