"""The objective of losses over labelled rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.config.preference import PreferenceConfig
from fastalign.data.batch import Batch
from fastalign.losses import UNPAIRED, implicit_rewards, kto_baseline
from fastalign.objectives.base import Metrics, Totals, mean_of
from fastalign.ops import segment_sum


class UnpairedObjective:
    """KTO or BCO over rows with a label. For KTO's baseline each row carries a second completion, of another row."""

    needs_reference = True

    def __init__(self, config: PreferenceConfig):
        self.config = config
        self.running = torch.zeros(2, 2, dtype=torch.float64)  # BCO: (sum, count) of rewards, undesirable and desirable

    def totals(self, batch: Batch) -> Totals:
        bounds = batch.packed.cu_seqlens
        return Totals(bounds.new_tensor(batch.desirable.numel()), bounds[-1], bounds[-1])

    def weight(self, totals: Totals) -> Tensor:
        return totals.items

    def __call__(self, logprobs: Tensor, ref_logprobs: Tensor, batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        config, bounds, labels = self.config, batch.packed.cu_seqlens, batch.desirable
        sums, ref_sums = segment_sum(logprobs, bounds), segment_sum(ref_logprobs, bounds)
        each = 2 if config.unpaired == "kto" else 1
        own, ref_own = sums[::each], ref_sums[::each]
        rewards = implicit_rewards(own.detach(), ref_own, config.reward_beta)
        if config.unpaired == "kto":
            shift = kto_baseline(sums[1::2], ref_sums[1::2])
        else:
            shift = self._reward_shift(rewards, labels, own.requires_grad)
        losses = UNPAIRED[config.unpaired](own, ref_own, labels, shift, **config.unpaired_options)
        metrics = {"baseline": mean_of(shift.view(1))}
        for name, mask in (("chosen", labels), ("rejected", ~labels)):
            metrics[f"rewards/{name}"] = ((rewards * mask).sum(), mask.sum())
            metrics[f"logps/{name}"] = ((own.detach() * mask).sum(), mask.sum())
        metrics["rewards/accuracies"] = mean_of(((rewards > 0) == labels).float())
        return losses.sum() / totals.items, metrics

    def _reward_shift(self, rewards: Tensor, labels: Tensor, training: bool) -> Tensor:
        """Half the sum of the running mean rewards of either label."""
        self.running = self.running.to(rewards.device)
        if training:
            for row, mask in enumerate((~labels, labels)):
                self.running[row] += torch.stack([(rewards * mask).sum().double(), mask.sum().double()])
        means = self.running[:, 0] / self.running[:, 1].clamp(min=1)
        return means.mean().to(rewards.dtype)
