"""The trainer of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastalign.config.base import AlignmentConfig
from fastalign.config.sft import SFTConfig
from fastalign.data.loading import Rows, load_rows
from fastalign.errors import DataError
from fastalign.objectives.sft import SFTObjective
from fastalign.training.preflight import check_config
from fastalign.training.trainer import AlignmentTrainer, tokenized

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
        formatting_func: From a row to the text to train on; None: rows are read by their columns.
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
        *,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        **trainer_options: Any,
    ):
        args = SFTConfig() if args is None else args
        check_config(args, SFTConfig)
        self._formatting_func = formatting_func
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
            objective=lambda args: SFTObjective(args.loss_type == "dft"), **trainer_options,
        )  # fmt: skip

    def _wanted(self, args: AlignmentConfig) -> str:
        return "completions"

    def _tokenize(self, rows, tokenizer, args: Any, name: str = "train"):
        answers_only = {"messages": args.assistant_only_loss, "prompt-completion": args.completion_only_loss}
        return tokenized(
            _as_texts(rows, self._formatting_func), tokenizer, args, self._wanted(args), name,
            score_all_of=[layout for layout, only in answers_only.items() if not only],
        )  # fmt: skip


def _as_texts(rows: Rows, formatting_func: Callable[[dict[str, Any]], str] | None) -> Rows:
    """The rows as texts that the function makes of them; the rows themselves without a function."""
    if formatting_func is None:
        return rows
    loaded: Any = load_rows(rows)  # one row of a Dataset is a dict, which its type leaves open
    texts = [formatting_func(row) for row in loaded]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(
                f"formatting_func made {text!r:.60} of row {number}; it must return one string, the text to train on"
            )
    return [{"text": text} for text in texts]
