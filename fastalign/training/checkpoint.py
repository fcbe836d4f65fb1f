"""Extra state of a checkpoint: tensors that the Trainer's own checkpoint does not save.

`transformers.Trainer` saves the model, the optimiser, the schedule and the random states. A run may change more than
that while it trains: BCO's running rewards, a reference that moves, the position in a replayed text. Without these a
resumed run would differ from one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

FILE_NAME = "fastalign.safetensors"


def extra_state(trainer: Any) -> dict[str, Tensor]:
    """The tensors to save: the `state` of the objective, of the reference and of each term that has one."""
    parts = [trainer.objective, trainer.reference, *trainer.terms]
    return {name: value for part in parts for name, value in getattr(part, "state", {}).items()}


def save_extra_state(run_folder: str | Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors into the checkpoint folder of a step; without tensors it writes nothing."""
    if tensors:
        path = Path(run_folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}" / FILE_NAME
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def load_extra_state(checkpoint: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Copies the saved values into the tensors, in place. Tensors that the folder does not have stay as they are."""
    path = Path(checkpoint) / FILE_NAME
    saved = load_file(path) if path.exists() else {}
    for name, value in tensors.items():
        if name in saved:
            value.copy_(saved[name])


def remove_pickled_arguments(folder: str | Path) -> None:
    """Deletes the training arguments that the Trainer saves beside a model: a pickle, which runs code when read."""
    (Path(folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)


class ExtraStateCheckpoints(Trainer):
    """The part of `AlignmentTrainer` that saves and loads checkpoints with the extra state in them."""

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        remove_pickled_arguments(output_dir or str(self.args.output_dir))

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            save_extra_state(self._get_output_dir(trial), self.state.global_step, extra_state(self))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_extra_state(resume_from_checkpoint, extra_state(self))
