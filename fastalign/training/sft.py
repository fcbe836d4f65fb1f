"""The trainer of supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastalign.config.sft import SFTConfig
from fastalign.data.files import Rows
from fastalign.errors import DataError
from fastalign.objectives.sft import SFTObjective
from fastalign.training.trainer import AlignmentTrainer

if TYPE_CHECKING:
    from fastalign.models.adapters import PeftConfig


class SFTTrainer(AlignmentTrainer):
    """Supervised fine-tuning on prompt/completion rows, assistant turns of messages, or plain text; see `SFTConfig`.

    Arguments and errors are those of `AlignmentTrainer`, without `objective`.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | Path,
        args: SFTConfig,
        train_dataset: Rows,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **trainer_options: Any,
    ):
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
            objective=lambda _: SFTObjective(), **trainer_options,
        )  # fmt: skip

    def _check_rows(self, dataset: Dataset, found: str, args: Any) -> None:
        if len(dataset[0]["completion_ids"]) != 1:
            raise DataError(f"The data set is '{found}'; fine-tuning takes text, messages, or prompt and completion.")
