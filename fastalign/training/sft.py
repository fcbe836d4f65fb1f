"""The trainer of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastalign.config.base import AlignmentConfig
from fastalign.config.sft import SFTConfig
from fastalign.data.loading import Rows
from fastalign.objectives.sft import SFTObjective
from fastalign.training.trainer import AlignmentTrainer

if TYPE_CHECKING:
    from fastalign.models.adapters import PeftConfig


class SFTTrainer(AlignmentTrainer):
    """Supervised fine-tuning on prompt/completion rows, assistant turns of messages, or plain text; see `SFTConfig`.

    Args:
        model: The model; this and all further arguments are those of `AlignmentTrainer`.
        args: The options; None: the defaults.
        train_dataset: Must be given: rows of text, of messages, or of prompt and completion.
        eval_dataset: Held-out rows; None: no evaluation.
        processing_class: The tokenizer; None: the one beside the model.
        peft_config: Trains an adapter.
        callbacks: Further callbacks.
        **trainer_options: Further arguments of `AlignmentTrainer`, `regularizers` for example.

    Raises:
        ConfigError: An option or a combination of options would fail later.
        DataError: The rows do not suit the method, or do not fit the model.
        ModelError: The model cannot be loaded or trained.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | Path,
        args: SFTConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **trainer_options: Any,
    ):
        args = SFTConfig() if args is None else args
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
            objective=lambda _: SFTObjective(), **trainer_options,
        )  # fmt: skip

    def _wanted(self, args: AlignmentConfig) -> str:
        return "completions"
