"""Distillation as training of its own: on a data set, or on what the student itself writes (GKD)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from fastalign.config.distillation import DistillationConfig
from fastalign.data.batch import Batch
from fastalign.errors import ConfigError, DataError
from fastalign.regularizers.distillation import Distillation
from fastalign.rollout.in_process import generate
from fastalign.training.sft import SFTTrainer

_WHOLE = 1_000_000


class DistillationTrainer(SFTTrainer):
    """Learns a teacher's next-token distributions: `a NLL + (1 - a) tau^2 D`, D the divergence from the teacher.

    Off-policy on the data set's completions. For a share `on_policy` of the steps, spread evenly, the completions are
    the student's own samples instead, where D alone counts: on-policy distillation, or GKD (Agarwal et al. 2024,
    arXiv:2306.13649; its lambda is `on_policy`, its beta `jsd_beta`).

    teacher: what `fastalign.Distillation` takes; None: `args.teacher`. Other arguments and errors are those of
    `SFTTrainer`.
    """

    def __init__(self, model, args: DistillationConfig, train_dataset, eval_dataset=None, processing_class=None,
                 peft_config=None, callbacks=None, *, teacher: str | PreTrainedModel | None = None,
                 regularizers: Sequence = (), **trainer_options):  # fmt: skip
        teacher = args.teacher if teacher is None else teacher
        if teacher is None:
            raise ConfigError("teacher is missing; give the model to learn from, or a file of its log-probs")
        self._samples = args.on_policy > 0
        distillation = Distillation(
            teacher, args.weight, args.temperature, args.divergence, args.jsd_beta, args.top_k, args.cache_dir
        )
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
            regularizers=[distillation, *regularizers], **trainer_options,
        )  # fmt: skip

    def _check_rows(self, dataset, found: str) -> None:
        super()._check_rows(dataset, found)
        if self._samples and not all(dataset["prompt_ids"]):
            raise DataError(f"The data set is '{found}'; on_policy samples from prompts: give prompt and completion.")

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one step, their completions drawn from the student where it is an on-policy one."""
        samples, totals = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples and self._on_policy(self.state.global_step):
            samples = [{"batch": self._sampled(sample["batch"])} for sample in samples]
            totals = self._get_num_items_in_batch(samples, device)
        return samples, totals

    def _on_policy(self, step: int) -> bool:
        share = round(self.args.on_policy * _WHOLE)
        return (step + 1) * share // _WHOLE > step * share // _WHOLE

    def _sampled(self, batch: Batch) -> Batch:
        prompts = [row["prompt_ids"] for row in batch.rows]
        model = self.accelerator.unwrap_model(self.model)
        completions = generate(
            model, self.processing_class, prompts, max_new_tokens=self.args.sample_tokens,
            temperature=self.args.sample_temperature,
        )  # fmt: skip
        rows = [
            {"prompt_ids": prompt, "completion_ids": [completion]}
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return replace(self.data_collator(rows)["batch"], sampled=True)
