"""Evaluation of a trainer on held-out rows, which may be given untokenised. Each evaluation logs its rows alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from fastalign.data.batch import Batch
from fastalign.data.collate import Collator
from fastalign.data.loading import Rows, of_each
from fastalign.data.processes import process_count, process_index
from fastalign.models.adapters import causal_lm
from fastalign.models.fit import check_fit
from fastalign.models.sharding import is_sharded
from fastalign.objectives.base import Metrics, Objective
from fastalign.training.checkpoint import random_state, set_random_state
from fastalign.training.metrics import MetricSums, held_out
from fastalign.training.out_of_memory import check_splittable, halves, in_parts, size_of, why_unsplittable
from fastalign.training.reference import Reference

logger = logging.getLogger("fastalign")


class HeldOutEvaluation(Trainer):
    """The part of `AlignmentTrainer` that evaluates. It reads the trainer's objective, reference and sums."""

    model: nn.Module
    processing_class: PreTrainedTokenizerBase
    objective: Objective
    reference: Reference | None
    sums: MetricSums
    data_collator: Collator
    _tokenize: Callable[..., Any]
    _with_reference: Callable[[Dataset], Dataset]

    def _wrap_model(self, model, training=True, dataloader=None):
        """`transformers.Trainer._wrap_model`; it makes sure that accelerate will put DDP around the model.

        An evaluation before training prepares the model without DDP. Accelerate then takes it for prepared, so each
        process would train by itself, without a word.
        """
        wrapped: Any = super()._wrap_model(model, training, dataloader)
        if training and self.args.world_size > 1 and wrapped is self.model and not self.is_fsdp_enabled:
            wrapped._is_accelerate_prepared = False
            self.accelerator._models = [model for model in self.accelerator._models if model is not wrapped]
        return wrapped

    def prediction_step(self, model, inputs: Any, prediction_loss_only, ignore_keys=None):
        """The loss of one held-out batch. Its metrics wait for `log`, which the Trainer calls after the last batch.

        Args:
            model: The model as training calls it, with its wrappers.
            inputs: What the collator returns: {"batch": Batch}.
            prediction_loss_only: Has no effect: there are no predictions.
            ignore_keys: Has no effect.

        Returns:
            (loss, None, None): a scalar, and neither predictions nor labels.

        Raises:
            TrainingError: Memory ran out on one row, or on a batch whose rows the loss compares.
        """
        weights = self.reference.weights if self.reference else None
        batch: Batch = inputs["batch"]
        rows = self._rows_of_data_set(len(batch.rows))
        if 0 < rows < len(batch.rows):
            batch = self.data_collator(batch.rows[:rows])["batch"].to(self.args.device)

        def score(batch: Batch) -> tuple[Tensor, Metrics]:
            with self.compute_loss_context_manager():
                return held_out(model, batch, self.objective, weights)

        losses, pairs = [], []
        # A batch of repeated rows alone is computed too: under FSDP the other processes wait for this one's part.
        for _, (loss, metrics) in in_parts(batch, score, self._halves_of_held_out):
            if rows:
                self.sums.add("eval", metrics)
            losses.append(loss.detach())
            pairs.append(torch.stack([part.detach().double() for part in metrics["loss"]]))  # (2,) sum and count
        if len(losses) == 1:
            return losses[0], None, None
        total, count = torch.stack(pairs).sum(0)
        return (total / count).to(losses[0].dtype), None, None

    def _halves_of_held_out(self, batch: Batch) -> list[Batch]:
        rows, tokens = batch.rows, size_of(batch)
        why_not = why_unsplittable(self.objective, self.args.world_size)
        check_splittable("Evaluation", rows, tokens, self.processing_class, why_not)
        logger.warning(
            "Evaluation: memory ran out on a batch of %d rows and %d tokens. It is computed in parts.",
            len(rows),
            tokens,
        )
        return halves(batch, self.data_collator)

    def _rows_of_data_set(self, rows: int) -> int:
        """How many rows of a batch count. In the last one accelerate repeats rows, so that all processes have as many.

        The processes' batches follow one another in the data set, so the rows that are left over come first.
        """
        state = self.accelerator.gradient_state
        if process_count() == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - process_index() * rows, 0), rows)

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        """`transformers.Trainer.evaluate`.

        Args:
            eval_dataset: Rows as the constructor takes them, or a dict of several such data sets by name. None: those
                of the constructor.
            *args: Further arguments of `transformers.Trainer.evaluate`.
            **kwargs: Likewise, by name.

        Returns:
            The metrics, each name with "eval_" in front.

        Raises:
            ConfigError: The rows need reference log-probs, and the weights that would give them have been trained.
            DataError: The rows do not suit the method, or do not fit the model.
        """
        return super().evaluate(self._held_out_rows(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        """`transformers.Trainer.predict`.

        Args:
            test_dataset: Rows as the constructor takes them.
            *args: Further arguments of `transformers.Trainer.predict`.
            **kwargs: Likewise, by name.

        Returns:
            What `transformers.Trainer.predict` returns, without predictions: its `metrics` are those of the rows.
        """
        return super().predict(self._held_out_rows(test_dataset), *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """`transformers.Trainer.evaluation_loop`, with the metrics of these rows alone, under their prefix.

        Random states are afterwards as they were: a run that was stopped before an evaluation, and that goes on without
        it, draws the same dropout as one that never stopped.
        """
        self.sums.clear("eval")
        random = random_state()
        whole = self.is_fsdp_enabled and not is_sharded(self.model)
        if whole:  # before training each process has the complete model, which the Trainer must not shard without AdamW
            self.accelerator._models.append(self.model)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if whole:
            self.accelerator._models.remove(self.model)
        set_random_state(random)
        means = self.sums.take_means("eval", prefix=f"{metric_key_prefix}_")
        return output._replace(metrics={**(output.metrics or {}), **means})

    def _held_out_rows(self, rows: Rows | Mapping[str, Rows] | None) -> Any:
        """Held-out rows as evaluation needs them: tokenised, and with the reference log-probs where they are stored."""
        if isinstance(rows, str) and isinstance(self.eval_dataset, dict) and rows in self.eval_dataset:
            return rows  # the Trainer evaluates one of the constructor's data sets by its name
        return of_each(rows, self._prepared_rows)

    def _prepared_rows(self, rows: Any, name: str) -> Dataset:
        if not (isinstance(rows, Dataset) and "prompt_ids" in rows.column_names):
            rows = self._tokenize(rows, self.processing_class, self.args, name)[0]
            check_fit(rows, causal_lm(self.model))
        return self._with_reference(rows)
