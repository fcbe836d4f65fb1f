"""The trainer of supervised fine-tuning."""

from __future__ import annotations

from fastalign.config.base import AlignmentConfig
from fastalign.config.sft import SFTConfig
from fastalign.objectives.sft import SFTObjective
from fastalign.training.trainer import AlignmentTrainer


class SFTTrainer(AlignmentTrainer):
    """Supervised fine-tuning on prompt/completion rows, assistant turns of messages, or plain text; see `SFTConfig`.

    Arguments and errors are those of `AlignmentTrainer`, without `objective`.
    """

    def __init__(self, model, args: SFTConfig, train_dataset, eval_dataset=None, processing_class=None,
                 peft_config=None, callbacks=None, **trainer_options):  # fmt: skip
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
            objective=lambda _: SFTObjective(), **trainer_options,
        )  # fmt: skip

    def _wanted(self, args: AlignmentConfig) -> str:
        return "completions"
