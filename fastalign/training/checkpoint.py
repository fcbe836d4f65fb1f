"""Checkpoints: everything that a run needs to go on as if it had never stopped.

`transformers.Trainer` saves the model, the optimiser, the schedule and the random states, the last three as pickles.
Here they are written as safetensors and JSON, into a folder that gets its name only when all of it is on the disk (see
`run_folder` and `manifest`). A checkpoint also holds what else changes while a run trains: BCO's running rewards, a
reference that moves, the position in a replayed text, and the sums of the metrics since the last logged line.

    checkpoint-<step>/
        adapter_model.safetensors or model.safetensors, and the files beside them
        trainer_state.json           transformers' state: step, epoch, the logged lines
        optimizer.{json,safetensors}, scheduler.json, scaler.json (fp16 only)
        process-<i>.{json,safetensors}   random states and sums of metrics of each process
        fastalign.safetensors        tensors of the objective, the reference and the regularisers
    rows.json                    a digest of the training rows, which must be the same when training goes on
        manifest.json                every file with its size and checksum
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.training_args import OptimizerNames

from fastalign.config.base import AlignmentConfig
from fastalign.data.keys import rows_fingerprint
from fastalign.errors import ConfigError, DataError, TrainingError, disk_error
from fastalign.files import check_writable, read_json
from fastalign.models.sharding import gathered
from fastalign.training.run_folder import (
    aside_of,
    check_space,
    check_unused,
    checkpoints,
    clear,
    find_checkpoint,
    finish_checkpoint,
    is_aside,
    move_into,
    recover,
    rotate,
    save_aside,
    set_aside_later,
    start_checkpoint,
)
from fastalign.training.state_files import load_state, save_state

FILE_NAME = "fastalign.safetensors"
ROWS = "rows.json"


def extra_state(trainer: Any) -> dict[str, Tensor]:
    """The tensors to save: the `state` of the objective, of the reference and of each term that has one."""
    parts = [trainer.objective, trainer.reference, *trainer.terms]
    return {name: value for part in parts for name, value in getattr(part, "state", {}).items()}


def save_extra_state(checkpoint: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors into a checkpoint; without tensors it writes nothing."""
    if tensors:
        save_file({name: value.contiguous() for name, value in tensors.items()}, Path(checkpoint) / FILE_NAME)


def load_extra_state(checkpoint: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Copies the saved values into the tensors, in place.

    Raises:
        ConfigError: The checkpoint holds other tensors, so it is of a run with other options.
    """
    path = Path(checkpoint) / FILE_NAME
    saved = load_file(path) if path.exists() else {}
    shapes = [{name: tuple(value.shape) for name, value in some.items()} for some in (saved, tensors)]
    if shapes[0] != shapes[1]:
        differing = sorted(name for name in {**saved, **tensors} if shapes[0].get(name) != shapes[1].get(name))
        raise ConfigError(
            f"{checkpoint} is of a run with another loss or other regularisers ({', '.join(differing[:3])} of "
            f"{FILE_NAME} differ): go on with the options that it was saved with"
        )
    for name, value in tensors.items():
        value.copy_(saved[name])


def random_state() -> dict[str, Any]:
    """The states of all random generators of this process."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}  # noqa: NPY002  # the global one
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets the random generators to a state that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002  # likewise
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def check_process_count(checkpoint: Path, count: int) -> None:
    """ConfigError if a checkpoint was saved by another number of processes: each has a random state of its own."""
    saved = len(list(checkpoint.glob("process-*.json")))
    if saved and saved != count:
        raise ConfigError(
            f"{checkpoint} was saved by {saved} {'process' if saved == 1 else 'processes'}, and now there "
            f"{'is 1' if count == 1 else f'are {count}'}, which would train on other rows at each step: go on with as "
            f"many as before (torchrun --nproc_per_node={saved}), or start a new run with model={checkpoint}"
        )


class AtomicCheckpoints(Trainer):
    """The part of `AlignmentTrainer` that saves and loads checkpoints."""

    args: AlignmentConfig  # these four are wider in transformers.Trainer
    model: nn.Module
    train_dataset: Dataset
    lr_scheduler: LRScheduler  # once training has begun
    stopping: Any  # the callback `StopOnSignal`
    sums: Any
    optimizer_state: Any  # these three are of `ShardedTraining`
    set_optimizer_state: Any
    load_before_sharding: Any
    throughput: Any
    begin_record: Any
    given: Any
    _rows: dict[str, Any] | None = None
    _random: Mapping[str, Any] | None = None  # the random state of a checkpoint, until it is set
    _logging: Mapping[str, Any] | None = None  # sums of a checkpoint, likewise

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """`transformers.Trainer.train`, from a checkpoint that was found whole.

        Args:
            resume_from_checkpoint: A checkpoint folder; True or "last" for the newest whole one in `output_dir`. None:
                what the options say.
            *args: Further arguments of `transformers.Trainer.train`.
            **kwargs: Likewise.
        """
        run = Path(str(self.args.output_dir))
        if self.args.should_save:
            recover(run)
        self.accelerator.wait_for_everyone()
        again = getattr(self, "_trained", False)  # a second call goes on with the weights in hand
        given = self.args.resume_from_checkpoint if resume_from_checkpoint is None and not again else None
        checkpoint = find_checkpoint(run, given if resume_from_checkpoint is None else resume_from_checkpoint)
        if checkpoint is not None:
            check_process_count(checkpoint, self.args.world_size)
        resumes = given is not None or resume_from_checkpoint not in (None, False)
        if not (resumes or again):
            check_unused(run, self.args.overwrite_output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and checkpoint is not None:
            set_aside_later(run, checkpoint)
        elif self.args.should_save and not again and self.args.overwrite_output_dir:
            clear(run)
        if self.args.should_save and self.args.save_strategy != "no":
            check_writable("output_dir", run)
            check_space(run, self.model, OptimizerNames(self.args.optim).value)
        if checkpoint is not None and self.is_fsdp_enabled:
            self.load_before_sharding(checkpoint)
        try:
            self.begin_record()
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        except OSError as error:  # of the log or of a library; checkpoints have their own, in `_save_checkpoint`
            if disk_error(error) is None:
                raise
            raise _unsaved("The run", run, error) from error

    def _run_epoch(self, *args, **kwargs):
        # A checkpoint of the last step leaves nothing to do. transformers would make one step more before it notices.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._logging is not None:
            self._restore_logging(self._logging)
            self._logging = None
        super()._run_epoch(*args, **kwargs)

    # Saving

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """Saves the model aside, then moves each file to its place, without the pickled training arguments."""
        folder = Path(output_dir or str(self.args.output_dir))
        aside = folder if is_aside(folder) or not self.args.should_save else save_aside(folder)
        super()._save(str(aside), state_dict)
        (aside / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if aside != folder:
            move_into(aside)

    def _save_checkpoint(self, model, trial):
        """Writes a checkpoint aside, gives it its name, and deletes the oldest ones. Errors leave the older ones."""
        run, step, writes = Path(self._get_output_dir(trial)), self.state.global_step, self.args.should_save
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        aside = aside_of(run, step)
        try:
            if writes:
                start_checkpoint(run, step)
            self.accelerator.wait_for_everyone()
            self.save_model(str(aside), _internal_call=True)
            self._write_state(run, aside)
            self.accelerator.wait_for_everyone()
            final = finish_checkpoint(aside) if writes else run / f"checkpoint-{step}"
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise _unsaved(f"The checkpoint of step {step}", run, error) from error
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if writes:
            best = self.state.best_model_checkpoint
            rotate(run, self.args.save_total_limit, Path(best) if best else None)

    def _write_state(self, run: Path, aside: Path) -> None:
        """Writes everything but the model."""
        if best := self.state.best_global_step:
            folder = run / f"checkpoint-{best}"
            if best == self.state.global_step or folder.exists():
                self.state.best_model_checkpoint = str(folder)
        # Whoever stops a run wants to go on with it, so that checkpoint holds everything.
        if not self.args.save_only_model or self.stopping.agreed is not None:
            save_state(aside, f"process-{self.args.process_index}", self._process_state())
            optimizer = self.optimizer_state()  # in all processes, since shards are gathered
            if self.args.should_save:
                save_state(aside, "optimizer", optimizer)
                save_state(aside, "scheduler", self.lr_scheduler.state_dict())
                if self.accelerator.scaler is not None:
                    save_state(aside, "scaler", self.accelerator.scaler.state_dict())
        extra = {name: gathered(value) for name, value in extra_state(self).items()}
        if self.args.should_save:
            save_extra_state(aside, extra)
            (aside / ROWS).write_text(json.dumps(self._rows_facts()) + "\n", encoding="utf-8")
            self._export_callbacks()
            self.state.save_to_json(str(aside / TRAINER_STATE_NAME))

    def _process_state(self) -> dict[str, Any]:
        """What each process has for itself: random states, and what was summed up since the last logged line."""
        logging = {
            "loss": self._tr_loss, "logged_step": self._globalstep_last_logged, "tokens": self.throughput.total,
            "sums": self.sums.sums["train"],
        }  # fmt: skip
        return {"random": random_state(), "logging": logging}

    def _restore_logging(self, state: Mapping[str, Any]) -> None:
        """Sets the sums, so that the next logged line is over the same steps as in a run that never stopped."""
        self._tr_loss += state["loss"].to(self._tr_loss.device)
        # The mean loss of this call of `train` is over its steps alone, so what came before is taken off here.
        self._total_loss_scalar -= state["loss"].item()
        self._globalstep_last_logged = state["logged_step"]
        self.throughput.total = state["tokens"]
        self.sums.sums["train"] = {name: pair.to(self.args.device) for name, pair in state["sums"].items()}

    def _export_callbacks(self) -> None:
        """Puts the state of callbacks that have one into the Trainer's, as the Trainer does."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states: Any = self.state.stateful_callbacks  # a dict once the Trainer has made its state
                name = type(callback).__name__
                if isinstance(states[name], list):
                    states[name].append(callback.state())
                else:
                    states[name] = callback.state()

    # Loading

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._check_rows(Path(resume_from_checkpoint))
        if not self.is_fsdp_enabled:  # else they were read before the model was sharded
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_extra_state(resume_from_checkpoint, extra_state(self))

    def _rows_facts(self) -> dict[str, Any]:
        """How many training rows there are, and a digest of them. They do not change while training, so it is kept."""
        if self._rows is None:
            # The stored log-probs of the reference are not part of the rows: another machine rounds them otherwise.
            digest = rows_fingerprint(self.train_dataset, leave_out=("ref_logprobs",))
            self._rows = {"rows": len(self.train_dataset), "sha256": digest}
        return self._rows

    def _check_rows(self, checkpoint: Path) -> None:
        """DataError if the training rows are not those of the run that saved the checkpoint.

        The position in the data is a number of rows, so with other rows training would go on at the wrong place.
        """
        saved, rows = read_json(checkpoint / ROWS), self._rows_facts()
        if not saved or saved == rows:  # checkpoints of older versions hold no digest
            return
        source = json.dumps(name) if (name := self.given.options.get("train")) else "train_dataset"
        what = f"{saved.get('rows')} rows then, {rows['rows']} now" if saved.get("rows") != rows["rows"] else (
            f"{rows['rows']} rows, of which some have other tokens"
        )  # fmt: skip
        raise DataError(
            f"{source} has changed since {checkpoint} was saved ({what}), so training cannot go on where it stopped: "
            "put the old rows and tokenisation options back, or start a new run with the checkpoint as its model."
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        optimizer, scheduler = load_state(folder, "optimizer"), load_state(folder, "scheduler")
        if optimizer is None or scheduler is None:
            raise ConfigError(
                f"{checkpoint} holds the model alone (save_only_model=True), so the optimiser cannot go on: start a "
                "new run with it as the model"
            )
        try:
            self.set_optimizer_state(optimizer)
        except ValueError as error:
            raise ConfigError(
                f"{checkpoint} was saved with other options ({error}): go on with the options that it was saved with"
            ) from error
        self.lr_scheduler.load_state_dict(scheduler)
        state = load_state(folder, f"process-{self.args.process_index}")
        self._random, self._logging = state["random"], state["logging"]

    def _load_scaler(self, checkpoint: str | None) -> None:
        state = load_state(Path(checkpoint), "scaler") if checkpoint is not None else None
        if state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.restore_random_state()

    def restore_random_state(self) -> None:
        """Sets the random generators as the checkpoint has them, at the first call after it was loaded.

        The Trainer calls this when it has fetched the first batches. What draws at random before must call it earlier.
        """
        state, self._random = self._random, None
        if state is not None:
            set_random_state(state)


def _unsaved(what: str, run: Path, error: Exception) -> TrainingError:
    """The error for something that could not be written into the run folder."""
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    older = checkpoints(run)
    remains = f"{older[-1]} is as it was" if older else "there is no checkpoint yet"
    return TrainingError(
        f"{what} cannot be written into {run} ({reason}), and {remains}: make room or mend the folder, then "
        "go on with resume_from_checkpoint=last."
    )
