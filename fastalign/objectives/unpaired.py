"""The objective of losses over labelled rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.config.preference import PreferenceConfig
from fastalign.data.batch import Batch
from fastalign.data.processes import process_count, sum_over_processes
from fastalign.errors import ConfigError
from fastalign.losses import UNPAIRED, implicit_rewards, kto_baseline
from fastalign.objectives.base import Metrics, Totals, mean_of, share_above
from fastalign.ops import segment_sum


class UnpairedObjective:
    """KTO, APO-zero or BCO over rows with a label, averaged over the rows of the accumulated batch.

    Each row of KTO has a second completion, which comes from a row with another prompt. The baseline of KTO is
    estimated from those (see `fastalign.data.collate.with_mismatched`).

    Args:
        config: Names the loss and its options.

    Raises:
        ConfigError: The configured loss takes pairs.
    """

    needs_reference = True
    needs_statistics = False

    def __init__(self, config: PreferenceConfig):
        if config.unpaired is None:
            raise ConfigError(f"loss_type is {config.loss_type}; UnpairedObjective takes one of {', '.join(UNPAIRED)}")
        self.config, self.loss = config, UNPAIRED[config.unpaired]
        self.has_baseline = config.unpaired == "kto"
        self.has_shift = config.unpaired == "bco"
        # KTO's baseline and BCO's shift are of all rows of a micro-batch, in all processes.
        self.compares_rows = self.has_baseline or self.has_shift
        # BCO shifts rewards by running means: (sum, count) of the rewards of undesirable and of desirable rows.
        self.running = torch.zeros(2, 2, dtype=torch.float64)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to save: BCO's running rewards."""
        return {"rewards": self.running} if self.has_shift else {}

    def totals(self, batch: Batch) -> Totals:
        """Rows, and scored tokens twice: there is no NLL of a part of them."""
        bounds = batch.packed.cu_seqlens
        return Totals(bounds.new_full((), batch.columns["label"].numel()), bounds[-1], bounds[-1])

    def weight(self, totals: Totals) -> Tensor:
        """The weight of this batch's loss when batch losses are averaged: its rows."""
        return totals.items

    def __call__(
        self, logprobs: Tensor, ref_logprobs: Tensor | None, batch: Batch, totals: Totals
    ) -> tuple[Tensor, Metrics]:
        """The loss over labelled rows, and metrics of rewards and log-probs for each label; see `Objective`."""
        assert ref_logprobs is not None, "losses over labelled rows compare with a reference: pass its log-probs"
        config, bounds, labels = self.config, batch.packed.cu_seqlens, batch.columns["label"]  # (B,) bool
        sums, ref_sums = segment_sum(logprobs, bounds), segment_sum(ref_logprobs, bounds)  # (C,)
        completions = 2 if self.has_baseline else 1  # per row: with KTO the second one is of another prompt
        matched, ref_matched = sums[::completions], ref_sums[::completions]  # (B,)
        rewards = implicit_rewards(matched.detach(), ref_matched, config.reward_beta)
        if self.has_baseline:
            shift = self._baseline(sums[1::2], ref_sums[1::2])
        elif not self.has_shift:
            shift = matched.new_zeros(())
        else:
            shift = self._reward_shift(rewards, labels, matched.requires_grad)
        losses = self.loss(matched, ref_matched, labels, shift, **config.unpaired_options)
        metrics = {"baseline": mean_of(shift.view(1))}
        for name, mask in (("chosen", labels), ("rejected", ~labels)):
            metrics[f"rewards/{name}"] = ((rewards * mask).sum(), mask.sum())
            metrics[f"logps/{name}"] = ((matched.detach() * mask).sum(), mask.sum())
        metrics["rewards/accuracies"] = share_above(torch.where(labels, rewards, -rewards))
        return losses.sum() / totals.items, metrics

    def _baseline(self, mismatched: Tensor, ref_mismatched: Tensor) -> Tensor:
        """KTO's baseline over the rows of all processes. A held-out batch is by itself, as with one process."""
        if process_count() == 1 or not mismatched.requires_grad:
            return kto_baseline(mismatched, ref_mismatched)
        log_ratios = (mismatched.detach() - ref_mismatched).double()
        total, count = sum_over_processes(torch.stack([log_ratios.sum(), torch.ones_like(log_ratios).sum()]))
        return (total / count).clamp(min=0).to(mismatched.dtype)

    def _reward_shift(self, rewards: Tensor, labels: Tensor, training: bool) -> Tensor:
        """BCO's delta: half the sum of the running mean rewards of the two labels. Only training updates the means."""
        self.running = self.running.to(rewards.device)
        if training:
            # Every process adds the rewards of all, so that all of them have the same means.
            sums = [torch.stack([(rewards * mask).sum().double(), mask.sum().double()]) for mask in (~labels, labels)]
            self.running += sum_over_processes(torch.stack(sums))
        means = self.running[:, 0] / self.running[:, 1].clamp(min=1)
        return means.mean().to(rewards.dtype)
