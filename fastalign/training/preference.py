"""The trainer of losses over pairs and over labelled rows."""

from __future__ import annotations

from torch import Tensor
from transformers import TrainerCallback

from fastalign.config.preference import PreferenceConfig
from fastalign.data.collate import with_mismatched
from fastalign.errors import DataError
from fastalign.models.snapshot import ReferenceWeights
from fastalign.objectives.preference import PreferenceObjective
from fastalign.objectives.unpaired import UnpairedObjective
from fastalign.training.trainer import AlignmentTrainer


class PreferenceTrainer(AlignmentTrainer):
    """Preference optimisation: DPO and its relatives on pairs, KTO and BCO on labelled rows; see `PreferenceConfig`.

    The reference is the model as it is given, adapter included, never one loaded anew. Arguments and errors are those
    of `AlignmentTrainer`.
    """

    def __init__(self, model, args: PreferenceConfig, train_dataset, eval_dataset=None, processing_class=None,
                 peft_config=None, callbacks=None, **trainer_options):  # fmt: skip
        self._unpaired = args.unpaired is not None
        objective = UnpairedObjective if self._unpaired else PreferenceObjective
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
            objective=objective, **trainer_options,
        )  # fmt: skip
        if args.sync_ref_model:
            self.add_callback(_MoveReference(self.reference, args))

    def _tokenise(self, rows, tokenizer, args):
        dataset, report = super()._tokenise(rows, tokenizer, args)
        return (with_mismatched(dataset) if args.unpaired == "kto" else dataset), report

    def _moving(self) -> dict[str, Tensor]:
        """BCO's mean rewards and a reference that is moved, beside what regularisers keep."""
        rewards = {"rewards": self.objective.running} if self.args.unpaired == "bco" else {}
        values = self.reference.values if self.args.sync_ref_model else []
        return super()._moving() | rewards | {f"reference.{i}": value for i, value in enumerate(values)}

    def _check_rows(self, dataset, found: str) -> None:
        if self._unpaired and "label" not in dataset.column_names:
            raise DataError(f"The data set is '{found}'; KTO and BCO need the columns prompt, completion and label.")
        if not self._unpaired and len(dataset[0]["completion_ids"]) != 2:
            raise DataError(f"The data set is '{found}'; a loss over pairs needs chosen and rejected columns.")


class _MoveReference(TrainerCallback):
    def __init__(self, reference: ReferenceWeights, args: PreferenceConfig):
        self.reference, self.args = reference, args

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.args.ref_model_sync_steps == 0:
            self.reference.move_towards_model(self.args.ref_model_mixup_alpha)
