"""The objective of supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from fastalign.data.batch import Batch
from fastalign.objectives.base import Metrics, Totals, mean_of


class SFTObjective:
    """Mean negative log-likelihood over the scored tokens of the accumulated batch."""

    needs_reference = False

    def totals(self, batch: Batch) -> Totals:
        bounds = batch.packed.cu_seqlens
        return Totals(bounds.new_tensor(bounds.numel() - 1), bounds[-1], bounds[-1])

    def weight(self, totals: Totals) -> Tensor:
        """Of one batch's loss in a mean over batches."""
        return totals.tokens

    def __call__(self, logprobs: Tensor, ref_logprobs: None, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        nll = -logprobs.sum()
        lengths = batch.packed.completion_lengths
        return nll / totals.tokens, {"lengths/chosen": mean_of(lengths)}
