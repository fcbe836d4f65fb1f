"""The objective of online methods: losses per token of sampled answers, weighted by their advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.config.online import OnlineConfig, Weight
from fastalign.data.batch import Batch
from fastalign.losses.policy import Level, cispo, is_clipped, log_importance_weights, ppo_clip, reduce_tokens, sapo
from fastalign.objectives.base import Metrics, Totals, mean_of


class PolicyObjective:
    """GRPO and its relatives, and RLOO.

    The batch has these columns:

    - `advantages` (C,): of the completions;
    - `old_logprobs` (S,): under the policy at the first step on these answers. Without the column this is that step,
      and they are the log-probs themselves: the ratio is exactly 1;
    - `sampling_logprobs` (S,): under the weights that drew the answers, as the engine computed them;
    - `left_out` (2 * rows,): completions and tokens of each row that are not in the batch, because they cannot change
      anything, but count in the means.

    Args:
        config: Names the method and its options.
    """

    needs_reference = needs_statistics = False

    def __init__(self, config: OnlineConfig):
        self.config, self.policy = config, config.policy

    def totals(self, batch: Batch) -> Totals:
        """Completions, tokens, and tokens that are scored; those left out count in the first two."""
        bounds = batch.packed.cu_seqlens  # (C + 1,)
        items, tokens = bounds.new_tensor(bounds.numel() - 1), bounds[-1]
        if (left := batch.columns.get("left_out")) is not None:
            more = left.view(-1, 2).sum(0).to(bounds.device)
            items, tokens = items + more[0], tokens + more[1]
        return Totals(items, tokens, bounds[-1])

    def weight(self, totals: Totals) -> Tensor:
        """The weight of this batch's loss when batch losses are averaged: its completions."""
        return totals.items

    def __call__(
        self, logprobs: Tensor, ref_logprobs: Tensor | None, batch: Batch, totals: Totals
    ) -> tuple[Tensor, Metrics]:
        """The loss of one micro-batch and its metrics; see `Objective`."""
        policy, columns, lengths = self.policy, batch.columns, batch.packed.cu_seqlens.diff()
        mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # (C, T)
        advantages = columns["advantages"].to(logprobs.dtype)
        current = _rows(logprobs, mask)
        old = _rows(columns["old_logprobs"].to(logprobs.dtype), mask) if "old_logprobs" in columns else current.detach()
        weights = mask.to(logprobs.dtype)
        log_ratio = log_importance_weights(current, old, weights, level=_level(policy.weight))  # (C, T) or (C, 1)
        if policy.weight == "sum":
            log_ratio = log_ratio.sum(1, keepdim=True)
        losses = self._losses(current, log_ratio, advantages)
        metrics = self._metrics(log_ratio, advantages, mask)
        if "sampling_logprobs" in columns:
            drawn = _rows(columns["sampling_logprobs"].to(logprobs.dtype), mask)
            off = (old - drawn).masked_fill(~mask, 0.0)
            metrics["sampling/sampling_logp_difference/mean"] = mean_of(off.abs()[mask])
            metrics["sampling/sampling_logp_difference/max"] = mean_of(off.abs().max().view(1))
            if self.config.importance_sampling_cap is not None:
                if losses.shape[1] == 1:
                    off = off.sum(1, keepdim=True)
                losses = losses * off.clamp(max=80.0).exp().clamp(max=self.config.importance_sampling_cap)
        return self._reduced(losses, weights, totals), metrics

    def _losses(self, current: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        """The losses per token (C, T), or per completion (C, 1)."""
        policy = self.policy
        if policy.surrogate == "cispo":
            return cispo(current, log_ratio, advantages, epsilon_high=policy.epsilon_high)
        if policy.surrogate == "sapo":
            return sapo(log_ratio, advantages)
        return ppo_clip(
            log_ratio, advantages, epsilon_low=policy.epsilon, epsilon_high=policy.epsilon_high,
            delta=self.config.delta,
        )  # fmt: skip

    def _reduced(self, losses: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        """The part of the step's loss that this micro-batch has. `reduce_tokens` divides by its own completions."""
        reduction, length = self.policy.reduction, self.config.max_completion_length
        if reduction == "token_mean":
            return reduce_tokens(losses, mask, reduction, num_items=totals.tokens)
        if losses.shape[1] == 1 and reduction == "sequence_mean":
            return losses.sum() / totals.items
        return reduce_tokens(losses, mask, reduction, max_length=length) * (len(mask) / totals.items)

    def _metrics(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Metrics:
        """How far the policy has moved since the answers were drawn."""
        counted = mask if log_ratio.shape[1] > 1 else mask[:, :1]
        ratio = log_ratio.detach().clamp(max=80.0).exp()[counted]
        metrics = {"importance_ratio/mean": mean_of(ratio)}
        if self.policy.surrogate != "sapo":
            low = self.policy.epsilon if self.policy.surrogate == "clip" else None
            # CISPO bounds the weight itself, the others how far it is above 1.
            high = self.policy.epsilon_high - (0.0 if low is not None else 1.0)
            clipped = is_clipped(log_ratio, advantages, epsilon_low=low, epsilon_high=high)
            metrics["clip_ratio/region_mean"] = mean_of(clipped[counted].float())
        return metrics


def _level(weight: Weight) -> Level:
    return "sequence" if weight == "sequence" else "token"


def _rows(values: Tensor, mask: Tensor) -> Tensor:
    """(S,) values of scored tokens as rows (C, T), 0 behind the end of a completion."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
