"""The trainer of reward models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastalign.config.quantization import Quantization
from fastalign.config.reward import RewardConfig
from fastalign.data.loading import Rows, load_rows
from fastalign.data.numbers import with_numbers
from fastalign.errors import ConfigError, DataError
from fastalign.models.adapters import adapter_base, has_adapter, merge_adapter
from fastalign.models.loading import load_model, load_tokenizer
from fastalign.models.reward import (
    choose_padding,
    is_reward_folder,
    is_reward_model,
    load_reward_model,
    save_reward_model,
    with_score_layer,
)
from fastalign.objectives.reward import RewardObjective
from fastalign.options import GivenAdapter
from fastalign.regularizers.ewc import L2SP
from fastalign.training.preflight import check_config
from fastalign.training.run_folder import move_into, save_aside
from fastalign.training.trainer import AlignmentTrainer, tokenized

if TYPE_CHECKING:
    from fastalign.models.adapters import PeftConfig


class RewardTrainer(AlignmentTrainer):
    """A reward model from pairs: the score of the chosen answer should be above that of the rejected one.

    The score is read at the last token of each answer, its end-of-text token included. The model that is saved is one
    of transformers' own (`AutoModelForSequenceClassification` with one label, an adapter merged), and gives the same
    scores there.

    A column `margin` says by how much the chosen answer should win.

    Args:
        model: The language model that training starts from, or a reward model that is trained further; this and the
            further arguments are those of `AlignmentTrainer`.
        args: The options; None: the defaults.
        train_dataset: Must be given: rows of prompt, chosen and rejected.
        eval_dataset: Held-out rows; None: no evaluation.
        processing_class: The tokenizer; None: the one beside the model. A copy is saved, whose padding token never ends
            an answer.
        peft_config: Trains an adapter and the score layer.
        callbacks: Further callbacks.
        adapter: None, or "merge" for a model whose adapter becomes part of its weights.
        **trainer_options: Further arguments of `AlignmentTrainer`.

    Raises:
        ConfigError: An option or a combination of options would fail later.
        DataError: The rows do not suit the method, or do not fit the model.
        ModelError: The model cannot be loaded or trained, or no token can be its padding.
    """

    args: RewardConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | Path,
        args: RewardConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        adapter: GivenAdapter | None = None,
        **trainer_options: Any,
    ):
        args = RewardConfig() if args is None else args
        check_config(args, RewardConfig)
        if args.fsdp:
            raise ConfigError("fsdp is on, and reward models are saved by one process as a whole: use DDP")
        _check_start(model, peft_config, adapter, trainer_options)
        if processing_class is None and isinstance(model, (str, Path)):
            processing_class = load_tokenizer(model)
        self._ends: set[int] = set()  # tokens that end answers
        self._seed = args.seed
        super().__init__(
            model, args, train_dataset, eval_dataset, copy.deepcopy(processing_class), _for_scores(peft_config),
            callbacks, objective=RewardObjective, **trainer_options,
        )  # fmt: skip

    def _wanted(self, args: RewardConfig) -> str:
        return "pairs"

    def _tokenize(self, rows, tokenizer: PreTrainedTokenizerBase, args: RewardConfig, name: str = "train"):
        """The rows as token ids. The tokenizer's padding token becomes one that ends no answer of these rows."""
        work = partial(tokenized, tokenizer=tokenizer, args=args, wanted="pairs", name=name)
        try:
            dataset, report = with_numbers(load_rows(rows).with_format(None), work, ["margin"])
        except DataError as error:
            raise error if str(error).startswith(name) else DataError(f"{name}: {error}") from error
        self._ends |= {ids[-1] for pair in dataset["completion_ids"] for ids in pair}
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(choose_padding(tokenizer, self._ends))
        return dataset, report

    def _load(
        self, model: nn.Module | str | Path, dtype: str | torch.dtype, way: GivenAdapter,
        peft_config: PeftConfig | None, quantization: Quantization, double_quantization: bool, quantize_head: bool,
    ) -> nn.Module:  # fmt: skip
        """The reward model that training starts from: as it is given, or a language model with a new score layer."""
        loaded: Any = model
        if isinstance(model, (str, Path)) and is_reward_folder(model):
            loaded = load_reward_model(model, dtype="float32" if peft_config is None and dtype == "auto" else dtype)
        elif isinstance(model, (str, Path)):
            loaded = load_model(model, dtype=dtype, for_adapter=peft_config is not None)
        elif has_adapter(model) and not is_reward_model(model):
            loaded = merge_adapter(model)
        return loaded if is_reward_model(loaded) else with_score_layer(loaded, self._seed)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the reward model as plain transformers loads it. Checkpoints hold an adapter by itself instead.

        Args:
            output_dir: The folder; None: that of the run.
            _internal_call: Whether the Trainer itself saves a checkpoint.
        """
        if _internal_call or not has_adapter(self.model):
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            aside = save_aside(Path(output_dir or str(self.args.output_dir)))
            save_reward_model(self.accelerator.unwrap_model(self.model), aside)
            self.processing_class.save_pretrained(aside)
            move_into(aside)


def _check_start(model: Any, peft_config: Any, adapter: Any, options: Mapping[str, Any]) -> None:
    """ConfigError for what a reward model cannot start from."""
    if adapter == "continue":
        raise ConfigError(
            "adapter is 'continue', but a reward model starts with an adapter of its own: merge the one that the model "
            "comes with first (`fastalign merge`), or set adapter='merge' to train all weights"
        )
    comes_with = adapter_base(model) is not None if isinstance(model, (str, Path)) else has_adapter(model)
    if comes_with and peft_config is not None:
        raise ConfigError(
            "The model comes with an adapter, and peft_config adds another: merge the first one (`fastalign merge RUN "
            "--out FOLDER`), and start from that folder"
        )
    if options.get("quantization", "none") != "none":
        raise ConfigError(
            f"quantization is {options['quantization']!r}; reward models are saved with their adapter merged, which "
            "would round quantised weights anew: leave it out"
        )
    if any(not isinstance(term, L2SP) for term in options.get("regularizers", ())):
        raise ConfigError("A reward model has no log-probs that a regulariser could hold: use l2_sp, or none")


def _for_scores(peft_config: Any) -> Any:
    """The configuration of an adapter with which the score layer is trained too."""
    if peft_config is None or not hasattr(peft_config, "task_type"):
        return peft_config
    config = copy.deepcopy(peft_config)
    config.task_type = "SEQ_CLS"
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), "score"]))
    return config
