"""The trainer of distillation: on a data set, or on what the student itself writes (GKD)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastalign.config.distillation import DistillationConfig
from fastalign.config.record import absolute
from fastalign.data.batch import Batch
from fastalign.data.loading import Rows
from fastalign.data.token_table import lengths
from fastalign.errors import ConfigError, DataError
from fastalign.regularizers.base import Regularizer
from fastalign.regularizers.distillation import Distillation
from fastalign.rollout.engine import Engine, Sampling
from fastalign.rollout.in_process import InProcess
from fastalign.training.preflight import check_config
from fastalign.training.sft import SFTTrainer

if TYPE_CHECKING:
    from fastalign.models.adapters import PeftConfig

# Shares of steps are counted in integers of this unit, so that they stay exact however long training is.
_MILLION = 1_000_000


class DistillationTrainer(SFTTrainer):
    """Learns a teacher's next-token distributions: `a NLL + (1 - a) tau^2 D`, D the divergence from the teacher.

    By default it is off-policy, on the completions of the data set. For a share `on_policy` of the steps, spread
    evenly, the completions are samples of the student instead, and D alone counts. That is on-policy distillation, or
    GKD (Agarwal et al. 2024, arXiv:2306.13649; its lambda is `on_policy`, its beta `jsd_beta`).

    Args:
        model: The student; this and the next six arguments are those of `SFTTrainer`.
        args: The options, a, tau and D among them.
        train_dataset: Rows of prompt and completion.
        eval_dataset: Held-out rows.
        processing_class: The tokenizer.
        peft_config: Trains an adapter.
        callbacks: Further callbacks.
        teacher: What `fastalign.Distillation` takes as its teacher; None: `args.teacher`.
        regularizers: Further regularisers.
        **trainer_options: Further arguments of `SFTTrainer`.

    Raises:
        ConfigError: There is no teacher, or an option or a combination of options would fail later.
        DataError: The rows do not suit the method (on_policy needs prompts), or do not fit the model.
        ModelError: The student or the teacher cannot be loaded, or they do not fit together.
    """

    args: DistillationConfig
    _engine: Engine | None = None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | Path,
        args: DistillationConfig,
        train_dataset: Rows,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        teacher: str | PreTrainedModel | None = None,
        regularizers: Sequence[Regularizer] = (),
        **trainer_options: Any,
    ):
        check_config(args, DistillationConfig)
        teacher = args.teacher if teacher is None else teacher
        if teacher is None:
            raise ConfigError("teacher is missing; give the model to learn from, or a file of its log-probs")
        distillation = Distillation(
            teacher, args.weight, args.temperature, args.divergence, args.jsd_beta, args.top_k, args.cache_dir
        )
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
            regularizers=[distillation, *regularizers], **trainer_options,
        )  # fmt: skip
        if isinstance(teacher, str):
            self.given.options["teacher"] = absolute(teacher)
            if not regularizers:
                self.given.objects.remove("regularizers")
        else:
            self.given.objects.append("teacher")

    def _tokenize(self, rows, tokenizer, args: DistillationConfig, name: str = "train"):
        dataset, report = super()._tokenize(rows, tokenizer, args, name)
        if args.on_policy > 0 and not lengths(dataset).prompts.all():
            raise DataError(
                f"{name}: The data set is '{report.format}'; on_policy samples from prompts: give prompt and "
                "completion."
            )
        return dataset, report

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimiser step. In an on-policy step the student writes their completions.

        The Trainer calls this once per optimiser step. The samples have other lengths than the data set's completions,
        so their totals are counted anew.

        Args:
            epoch_iterator: The data loader's iterator.
            num_batches: Micro-batches per optimiser step.
            device: Where the totals go.

        Returns:
            The micro-batches, and the `Totals` that their losses are divided by.
        """
        samples, totals = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples and self._on_policy(self.state.global_step):
            self.restore_random_state()  # a resumed run draws its first samples here
            engine = self._synced_engine()
            samples = [{"batch": self._sampled(sample["batch"], engine)} for sample in samples]
            totals = self._get_num_items_in_batch(samples, device)
        return samples, totals

    def _on_policy(self, step: int) -> bool:
        """Whether a step is on-policy: where `share * (step + 1)` passes the next whole number (Bresenham's line)."""
        share = round(self.args.on_policy * _MILLION)
        return (step + 1) * share // _MILLION > step * share // _MILLION

    def _synced_engine(self) -> Engine:
        """What samples from the student, with its present weights. It is made at the first on-policy step."""
        model = self.accelerator.unwrap_model(self.model)
        if self._engine is None:
            self._engine = InProcess(model, self.processing_class)
        else:
            self._engine.sync(model)
        return self._engine

    def _sampled(self, batch: Batch, engine: Engine) -> Batch:
        """The batch with one sample of the student after each prompt instead of the completion."""
        prompts = [row["prompt_ids"] for row in batch.rows]
        rollouts = engine.generate(prompts, 1, Sampling(self.args.sample_tokens, self.args.sample_temperature))
        rows = [{"prompt_ids": r.prompt_ids, "completion_ids": r.completion_ids} for r in rollouts]
        return replace(self.data_collator(rows)["batch"], sampled=True)
