"""The objective of supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from fastalign.data.batch import Batch
from fastalign.objectives.base import Metrics, Totals, mean_of


class SFTObjective:
    """Mean negative log-likelihood over the scored tokens of the accumulated batch: `-sum log p(token) / tokens`.

    Args:
        dft: Weigh each token by its probability: `-sum sg(p(token)) log p(token) / tokens`, where sg stops the gradient
            (dynamic fine-tuning, Wu et al. 2025, arXiv:2508.05629). The NLL is then logged as `nll_loss`.
    """

    needs_reference = False
    needs_statistics = False

    def __init__(self, dft: bool = False):
        self.dft = dft

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
        metrics = {"lengths/chosen": mean_of(batch.packed.completion_lengths)}
        loss = -logprobs.sum()
        if self.dft:
            metrics["nll_loss"] = mean_of(-logprobs)
            loss = -(logprobs.detach().exp() * logprobs).sum()
        return loss / totals.tokens, metrics
