"""The objective of reward models."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.config.reward import RewardConfig
from fastalign.data.batch import Batch
from fastalign.losses.reward import bradley_terry
from fastalign.objectives.base import Metrics, Totals, mean_of, share_above


class RewardObjective:
    """The Bradley-Terry loss, averaged over the pairs of the accumulated batch.

    The completions of a batch alternate: even ones are chosen, odd ones are rejected. The column `margin`, if there is
    one, is by how much the chosen one should win.

    Args:
        config: Gives the coefficient of centring.
    """

    needs_reference = needs_statistics = False

    def __init__(self, config: RewardConfig):
        self.center = config.center_rewards_coefficient

    def totals(self, batch: Batch) -> Totals:
        """Pairs, and scored tokens twice, which no term of this loss is divided by."""
        bounds = batch.packed.cu_seqlens  # (2 * pairs + 1,)
        return Totals(bounds.new_tensor((bounds.numel() - 1) // 2), bounds[-1], bounds[-1])

    def weight(self, totals: Totals) -> Tensor:
        """The weight of this batch's loss when batch losses are averaged: its pairs."""
        return totals.items

    def __call__(
        self, logprobs: Tensor, ref_logprobs: Tensor | None, batch: Batch, totals: Totals
    ) -> tuple[Tensor, Metrics]:
        """The loss and the metrics of one micro-batch.

        Args:
            logprobs: (2 * pairs,) scores of the completions, which is what a reward model gives instead.
            ref_logprobs: None.
            batch: The micro-batch.
            totals: The totals of the accumulated batch.

        Returns:
            The loss, a scalar, and the metrics.
        """
        chosen, rejected = logprobs[0::2], logprobs[1::2]  # (pairs,)
        margin = batch.columns.get("margin")
        margin = None if margin is None else margin.to(chosen.dtype)
        losses = bradley_terry(chosen, rejected, margin, center_rewards_coefficient=self.center)
        lengths = batch.packed.completion_lengths
        difference = (chosen - rejected).detach()
        longer_wins = ((lengths[0::2] > lengths[1::2]) == (difference > 0))[lengths[0::2] != lengths[1::2]]
        metrics = {
            "rewards/chosen": mean_of(chosen),
            "rewards/rejected": mean_of(rejected),
            "rewards/margins": mean_of(difference),
            "rewards/accuracies": share_above(difference),
            # How often the longer answer of a pair gets the higher score: 0.5 where length does not count.
            "rewards/prefers_longer": mean_of(longer_wins.to(torch.float32)),
            "lengths/chosen": mean_of(lengths[0::2]),
            "lengths/rejected": mean_of(lengths[1::2]),
        }
        return losses.sum() / totals.items, metrics
