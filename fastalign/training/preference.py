"""The trainer of losses over pairs and over labelled rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastalign.config.preference import PreferenceConfig
from fastalign.data.collate import Collator, with_mismatched
from fastalign.data.loading import Rows, of_each
from fastalign.data.packing import PackedBatch, lay_out, pad_to_multiple
from fastalign.errors import ConfigError
from fastalign.models.adapters import has_adapter
from fastalign.models.modes import evaluation_mode
from fastalign.models.snapshot import ReferenceWeights, fingerprint
from fastalign.objectives.preference import PreferenceObjective
from fastalign.objectives.unpaired import UnpairedObjective
from fastalign.training.callbacks import MoveReference
from fastalign.training.preflight import check_config
from fastalign.training.reference import Reference, autocast_dtype, precompute, product_dtype
from fastalign.training.trainer import AlignmentTrainer

if TYPE_CHECKING:
    from fastalign.models.adapters import PeftConfig


class PreferenceTrainer(AlignmentTrainer):
    """Preference optimisation: DPO and its relatives on pairs, KTO and BCO on labelled rows; see `PreferenceConfig`.

    The reference is the model as training finds it: with its adapter, if it comes with one. No second model is loaded.

    Args:
        model: The policy; this and all further arguments are those of `AlignmentTrainer`.
        args: The options, the loss among them; None: the defaults.
        train_dataset: Must be given: rows of prompt, chosen and rejected; for kto and bco rows of prompt, completion
            and label.
        eval_dataset: Held-out rows; None: no evaluation.
        processing_class: The tokenizer; None: the one beside the model.
        peft_config: Trains an adapter.
        callbacks: Further callbacks.
        **trainer_options: Further arguments of `AlignmentTrainer`, `regularizers` for example.

    Raises:
        ConfigError: An option or a combination of options would fail later.
        DataError: The rows do not suit the loss, or do not fit the model.
        ModelError: The model cannot be loaded or trained.
    """

    args: PreferenceConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | Path,
        args: PreferenceConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **trainer_options: Any,
    ):
        args = PreferenceConfig() if args is None else args
        check_config(args, PreferenceConfig)
        objective = UnpairedObjective if args.unpaired else PreferenceObjective
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
            objective=objective, **trainer_options,
        )  # fmt: skip

    def _wanted(self, args: PreferenceConfig) -> str:
        return "labelled" if args.unpaired else "pairs"

    def _tokenize(self, rows, tokenizer, args: PreferenceConfig, name: str = "train"):
        dataset, report = super()._tokenize(rows, tokenizer, args, name)
        return (with_mismatched(dataset) if args.unpaired == "kto" else dataset), report

    def _collator(self) -> Collator:
        collator = super()._collator()
        collator.score_prompts = self.args.nll_over == "prompt_and_completion"
        if collator.score_prompts and self.layout == "padded":
            raise ConfigError("nll_over='prompt_and_completion' needs a model that can be packed; use 'completion'")
        return collator

    def _prepare_reference(self) -> Reference:
        """Keeps the weights in hand as the reference.

        - precompute_ref_log_probs=True stores the log-probs of every row before training.
        - An adapter is small, so it is copied in any case. With the copy an evaluation has the exact KL divergence.
        - Otherwise a copy of the weights is scored at every step.
        """
        args = self.args
        adapter = has_adapter(self.model)
        weights = ReferenceWeights(self.model) if adapter or not args.precompute_ref_log_probs else None
        if args.precompute_ref_log_probs:
            self._reference_key = fingerprint(self.model, str(autocast_dtype(args)))
            self.train_dataset = self._precompute(self.train_dataset, self._score_rows)
            if self.eval_dataset is not None and weights is None:  # with a copy, evaluations score it anyway
                self.eval_dataset = of_each(self.eval_dataset, lambda rows, _: self._precompute(rows, self._score_rows))
        if args.sync_ref_model and weights is not None:  # the config refuses stored log-probs with it
            self.add_callback(MoveReference(weights, args.ref_model_mixup_alpha, args.ref_model_sync_steps))
        return Reference(weights, product_dtype(args, self.model), args.ref_cache_dir, moves=args.sync_ref_model)

    def _with_reference(self, dataset: Dataset) -> Dataset:
        """The rows with their stored log-probs, if there is no copy of the reference to score them with."""
        if self.reference is None or self.reference.weights is not None or "ref_logprobs" in dataset.column_names:
            return dataset
        score = self._score_rows if self.at_start else _reference_is_gone
        return self._precompute(dataset, score)

    def _precompute(self, dataset: Dataset, score) -> Dataset:
        """The rows with their log-probs under the reference, which `score` computes where they are not stored."""
        args = self.args
        show = args.should_log and not args.disable_tqdm
        return precompute(
            dataset, score, self._reference_key, args.ref_cache_dir, tokenizer=self.processing_class, show=show
        )

    @torch.no_grad()
    def _score_rows(self, rows: list[dict]) -> tuple[PackedBatch, Tensor]:
        """The batch of some rows, and the (S,) log-probs of its completions under the model as it is."""
        packed = lay_out(rows, self.layout, self.data_collator.pad_token_id)
        packed = pad_to_multiple(packed, self.data_collator.multiple)
        # Accelerate wraps the model's forward with autocast only once training starts.
        with evaluation_mode(self.model), self.accelerator.autocast():
            scores = self.model(packed=packed.to(self.args.device))
        return packed, scores.logprobs


def _reference_is_gone(rows: list[dict]):
    raise ConfigError(
        "These rows have no stored reference log-probs, and the weights that would give them have been trained: pass "
        "the rows as eval_dataset, evaluate them once before training, or set precompute_ref_log_probs=False."
    )
