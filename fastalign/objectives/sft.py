"""The objective of supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from fastalign.data.batch import Batch
from fastalign.objectives.base import Metrics, Totals, mean_of


class SFTObjective:
    """Mean negative log-likelihood over the scored tokens of the accumulated batch: `-sum log p(token) / tokens`."""

    needs_reference = False

    def totals(self, batch: Batch) -> Totals:
        """Completions, and scored tokens twice: the NLL is over all of them."""
        bounds = batch.packed.cu_seqlens  # (C + 1,)
        return Totals(bounds.new_full((), bounds.numel() - 1), bounds[-1], bounds[-1])

    def weight(self, totals: Totals) -> Tensor:
        """The weight of this batch's loss when batch losses are averaged: its tokens."""
        return totals.tokens

    def __call__(
        self, logprobs: Tensor, ref_logprobs: Tensor | None, batch: Batch, totals: Totals
    ) -> tuple[Tensor, Metrics]:
        """The NLL per token and the lengths; see `Objective`."""
        nll = -logprobs.sum()
        lengths = batch.packed.completion_lengths
        return nll / totals.tokens, {"lengths/chosen": mean_of(lengths)}
