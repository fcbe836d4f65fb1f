"""What a trainer minimises: token log-probabilities of one micro-batch in, one loss and its metrics out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastalign.data.batch import Batch

# Metric name -> (sum, count), two scalar tensors. A mean of means would give a short micro-batch the weight of a full
# one. Sums and counts add up exactly, and they stay on the device until a line is logged.
Metrics = dict[str, tuple[Tensor, Tensor]]


# The column of a batch with log p(y) - log sum_v p(v)^2 of each target. The trainer adds it where the model was called
# with `statistics=True`.
ALIGNED = "aligned_logprobs"


class Totals(NamedTuple):
    """What a loss is divided by: counts over all micro-batches of one optimiser step.

    An objective divides by the totals of the whole accumulated batch instead of the micro-batch. Micro-batches
    differ in their numbers of tokens, so a mean of their means would weight tokens by where they happen to lie. With
    totals, 8 micro-batches of 1 row and 1 of 8 rows give the same update.

    Attributes:
        items: () pairs of a loss over pairs, rows otherwise.
        tokens: () tokens that the NLL is averaged over.
        scored: () scored tokens of all completions.
    """

    items: Tensor
    tokens: Tensor
    scored: Tensor


class Objective(Protocol):
    """What a trainer minimises. A new method implements these three methods and the flags.

    An objective that changes while it is trained also has `state`, a dictionary of the tensors to save in checkpoints.

    Attributes:
        needs_reference: Whether the loss compares with log-probs under the reference.
        needs_statistics: Whether the loss reads the column `ALIGNED`.
    """

    needs_reference: bool
    needs_statistics: bool

    def totals(self, batch: Batch) -> Totals:
        """The counts of one micro-batch, which the trainer adds up over the accumulated batch."""
        ...

    def weight(self, totals: Totals) -> Tensor:
        """The weight of this batch's loss when batch losses are averaged, as in an evaluation."""
        ...

    def __call__(
        self, logprobs: Tensor, ref_logprobs: Tensor | None, batch: Batch, totals: Totals
    ) -> tuple[Tensor, Metrics]:
        """The loss of one micro-batch and its metrics.

        Args:
            logprobs: (S + batch.prompt_tokens,) log-probs in nats of the scored tokens under the model.
            ref_logprobs: (S,) the completions' log-probs under the reference; None if the objective needs none.
            batch: The micro-batch.
            totals: The totals of the accumulated batch.

        Returns:
            The loss, a scalar that adds up over micro-batches, and the metrics without a graph.
        """
        ...


def share_above(values: Tensor) -> tuple[Tensor, Tensor]:
    """The metric (sum, count) of the share of `values` above 0. A value of exactly 0 counts half.

    Before the first step every reward is 0. Counted as wrong, an accuracy would begin at 0 %, which looks like a model
    that prefers every rejected completion. It begins at 50 %, as by a coin.
    """
    return mean_of((values.sign() + 1) / 2)


def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """The metric (sum, count) whose quotient is the mean of `values`, without a graph."""
    values = values.detach()
    return values.sum(), torch.full((), values.numel(), device=values.device)
