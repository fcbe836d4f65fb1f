"""The objective of losses over pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.config.preference import PreferenceConfig
from fastalign.data.batch import Batch
from fastalign.losses import divergence_scores, implicit_rewards, pairwise_loss
from fastalign.objectives.base import ALIGNED, Metrics, Totals, mean_of, share_above
from fastalign.ops import segment_sum


def tail_weights(logprobs: Tensor, bounds: Tensor, ld_alpha: float) -> Tensor:
    """LD-DPO's weight of each token (S,): 1, but `ld_alpha` where a completion is longer than the other of its pair.

    Args:
        logprobs: (S,) of the completions' tokens; only their number, dtype and device count.
        bounds: (2 * pairs + 1,) where each completion begins; chosen and rejected alternate.
        ld_alpha: The weight of the longer one's last tokens.
    """
    count, lengths = len(logprobs), bounds.diff()
    shared = torch.minimum(lengths[0::2], lengths[1::2]).repeat_interleave(2)  # (2 * pairs,)
    end_of_shared = (bounds[:-1] + shared).repeat_interleave(lengths, output_size=count)  # (S,)
    tail = torch.arange(count, device=bounds.device) >= end_of_shared
    return 1 - (1 - ld_alpha) * tail.to(logprobs.dtype)


class PreferenceObjective:
    """A loss over pairs or a weighted mixture of them, plus `nll_coefficient` times the NLL of the chosen completions.

    The loss is `sum of pair losses / pairs + nll_coefficient * NLL of chosen / its tokens`. The completions of a batch
    alternate: even ones are chosen, odd ones are rejected.

    Args:
        config: Names the losses, their weights and their options.
    """

    def __init__(self, config: PreferenceConfig):
        self.config = config
        self.needs_reference = config.needs_reference
        self.needs_statistics = config.use_weighting
        self.compares_rows = any(name in ("aot", "aot_unpaired") for name in config.pairwise)  # these sort the pairs

    def totals(self, batch: Batch) -> Totals:
        """Pairs, tokens of the NLL (chosen completions, and prompts where they are scored), and scored tokens."""
        bounds = batch.packed.cu_seqlens  # (2 * pairs + 1,)
        lengths = bounds.diff()
        tokens = lengths[0::2].sum() + batch.prompt_tokens
        return Totals(lengths.new_full((), lengths.numel() // 2), tokens, bounds[-1])

    def weight(self, totals: Totals) -> Tensor:
        """The weight of this batch's loss when batch losses are averaged: its pairs."""
        return totals.items

    def __call__(
        self, logprobs: Tensor, ref_logprobs: Tensor | None, batch: Batch, totals: Totals
    ) -> tuple[Tensor, Metrics]:
        """The loss over pairs plus the weighted NLL, and metrics of rewards and log-probs; see `Objective`."""
        config, bounds = self.config, batch.packed.cu_seqlens
        scored = logprobs.shape[0] - batch.prompt_tokens
        weights = 1.0 if config.ld_alpha is None else tail_weights(logprobs[:scored], bounds, config.ld_alpha)
        sums = segment_sum(logprobs[:scored] * weights, bounds)  # (2 * pairs,)
        chosen, rejected = sums[0::2], sums[1::2]  # (pairs,)
        references = (None, None)
        if ref_logprobs is not None:
            ref_sums = segment_sum(ref_logprobs * weights, bounds)
            references = ref_sums[0::2], ref_sums[1::2]
        losses = self._losses(chosen, rejected, references, bounds.diff())
        pair_weights = self._pair_weights(batch, scored)
        # Divided by the pairs of the whole step, so that the losses of its micro-batches add up to the mean.
        loss = (losses * pair_weights).sum() / totals.items
        metrics = self._metrics(chosen, rejected, references, batch)
        # Tokens of prompts, where they are scored, lie behind the completions: nll_over="prompt_and_completion".
        all_sums = sums if config.ld_alpha is None else segment_sum(logprobs[:scored], bounds)
        nll = -(all_sums[0::2].sum() + logprobs[scored:].sum())
        if config.nll_coefficient:
            loss = loss + config.nll_coefficient * nll * pair_weights.mean() / totals.tokens
        metrics["nll_loss"] = (nll.detach(), self.totals(batch).tokens)
        return loss, metrics

    def _losses(
        self, chosen: Tensor, rejected: Tensor, references: tuple[Tensor | None, Tensor | None], lengths: Tensor
    ) -> Tensor:
        """The (pairs,) weighted losses; zeros where there is an NLL term alone."""
        config = self.config
        if not config.pairwise:
            return torch.zeros_like(chosen)
        if config.f_divergence_type != "reverse_kl":
            # Scores take the place of log-ratios: the losses get them as if the reference were 0.
            how, alpha, zero = config.f_divergence_type, config.f_alpha_divergence_coef, torch.zeros_like(chosen)
            of_chosen, of_rejected = references
            assert of_chosen is not None and of_rejected is not None  # the losses that have divergences need them
            chosen = divergence_scores(chosen - of_chosen, how, alpha)
            rejected = divergence_scores(rejected - of_rejected, how, alpha)
            references = zero, zero
        return pairwise_loss(
            list(config.pairwise), list(config.pairwise.values()), chosen, rejected, *references,
            lengths_chosen=lengths[0::2], lengths_rejected=lengths[1::2], options=config.loss_options,
        )  # fmt: skip

    def _pair_weights(self, batch: Batch, scored: int) -> Tensor:
        """WPO's weight of each pair (pairs,), without gradient; a single 1 without it."""
        bounds = batch.packed.cu_seqlens
        if not self.config.use_weighting:
            return torch.ones((), device=bounds.device)
        means = segment_sum(batch.columns[ALIGNED][:scored], bounds) / bounds.diff().clamp(min=1)
        return (means[0::2] + means[1::2]).exp()

    def _metrics(
        self, chosen: Tensor, rejected: Tensor, references: tuple[Tensor | None, Tensor | None], batch: Batch
    ) -> Metrics:
        """Implicit rewards, log-probs and lengths. A loss without a reference gets rewards as if it were 0."""
        zero = torch.zeros_like(chosen)
        ref_chosen, ref_rejected = (zero if reference is None else reference for reference in references)
        beta, lengths = self.config.reward_beta, batch.packed.completion_lengths
        rewards = (
            implicit_rewards(chosen.detach(), ref_chosen, beta),
            implicit_rewards(rejected.detach(), ref_rejected, beta),
        )
        margins = rewards[0] - rewards[1]
        scored = batch.packed.cu_seqlens.diff().clamp(min=1)  # at least 1, since a completion may have no scored token
        per_token = chosen / scored[0::2] - rejected / scored[1::2]
        return {
            "rewards/chosen": mean_of(rewards[0]),
            "rewards/rejected": mean_of(rewards[1]),
            "rewards/margins": mean_of(margins),
            "rewards/accuracies": share_above(margins),
            "logps/chosen": mean_of(chosen),
            "logps/rejected": mean_of(rejected),
            "logps/accuracies": mean_of((per_token > 0).float()),
            "lengths/chosen": mean_of(lengths[0::2]),
            "lengths/rejected": mean_of(lengths[1::2]),
        }
