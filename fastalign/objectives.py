"""What a trainer minimises: token log-probabilities of one micro-batch in, one loss and its metrics out.

An objective divides by the totals of the whole accumulated batch, so that 8 micro-batches of 1 and 1 of 8 give the
same update. Metrics are (sum, count) pairs that stay on the device until something is logged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.config import PreferenceConfig
from fastalign.losses import UNPAIRED, implicit_rewards, kto_baseline, pairwise_loss
from fastalign.ops import segment_sum
from fastalign.packing import PackedBatch

Metrics = dict[str, tuple[Tensor, Tensor]]


class Totals(NamedTuple):
    """Of all micro-batches of one optimiser step: pairs (or rows), and the tokens that averages are taken over."""

    items: Tensor
    tokens: Tensor  # of the NLL
    scored: Tensor  # of all completions

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass
class Batch:
    """One micro-batch as the collator makes it."""

    packed: PackedBatch
    ref_logprobs: Tensor | None = None  # (S,) of the completions' tokens
    desirable: Tensor | None = None  # (B,) bool, unpaired rows
    prompt_tokens: int = 0  # the last so many of `packed.targets` are tokens of prompts, behind cu_seqlens[-1]
    rows: list[dict] | None = None  # what was laid out
    sampled: bool = False  # the completions are the model's own, not the data set's

    def to(self, device, non_blocking: bool = False) -> Batch:
        del non_blocking  # PackedBatch.to does not block either way
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")})


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
        return nll / totals.tokens, {"lengths/chosen": _mean(lengths)}


class PreferenceObjective:
    """A loss over pairs, or a weighted mixture, plus the chosen completions' NLL where it is asked for."""

    def __init__(self, config: PreferenceConfig):
        self.config = config
        self.needs_reference = config.needs_reference

    def totals(self, batch: Batch) -> Totals:
        bounds = batch.packed.cu_seqlens
        lengths = bounds.diff()
        tokens = lengths[0::2].sum() + batch.prompt_tokens
        return Totals(lengths.new_tensor(lengths.numel() // 2), tokens, bounds[-1])

    def weight(self, totals: Totals) -> Tensor:
        return totals.items

    def __call__(
        self, logprobs: Tensor, ref_logprobs: Tensor | None, batch: Batch, totals: Totals
    ) -> tuple[Tensor, Metrics]:
        config, bounds = self.config, batch.packed.cu_seqlens
        scored = logprobs.shape[0] - batch.prompt_tokens
        sums, lengths = segment_sum(logprobs[:scored], bounds), bounds.diff()
        chosen, rejected = sums[0::2], sums[1::2]
        references = (None, None)
        if ref_logprobs is not None:
            ref_sums = segment_sum(ref_logprobs, bounds)
            references = ref_sums[0::2], ref_sums[1::2]
        loss = 0.0
        if config.pairwise:
            losses = pairwise_loss(
                list(config.pairwise), list(config.pairwise.values()), chosen, rejected, *references,
                lengths_chosen=lengths[0::2], lengths_rejected=lengths[1::2], options=config.loss_options,
            )  # fmt: skip
            loss = losses.sum() / totals.items
        metrics = self._metrics(chosen, rejected, references, batch)
        nll = -(chosen.sum() + logprobs[scored:].sum())
        if config.nll_coefficient:
            loss = loss + config.nll_coefficient * nll / totals.tokens
        metrics["nll_loss"] = (nll.detach(), self.totals(batch).tokens)
        return loss, metrics

    def _metrics(self, chosen: Tensor, rejected: Tensor, references: tuple, batch: Batch) -> Metrics:
        zero = torch.zeros_like(chosen)
        ref_chosen, ref_rejected = references if references[0] is not None else (zero, zero)
        beta, lengths = self.config.reward_beta, batch.packed.completion_lengths
        rewards = (
            implicit_rewards(chosen.detach(), ref_chosen, beta),
            implicit_rewards(rejected.detach(), ref_rejected, beta),
        )
        margins = rewards[0] - rewards[1]
        scored = batch.packed.cu_seqlens.diff().clamp(min=1)
        per_token = chosen / scored[0::2] - rejected / scored[1::2]
        return {
            "rewards/chosen": _mean(rewards[0]),
            "rewards/rejected": _mean(rewards[1]),
            "rewards/margins": _mean(margins),
            "rewards/accuracies": _mean((margins > 0).float()),
            "logps/chosen": _mean(chosen),
            "logps/rejected": _mean(rejected),
            "logps/accuracies": _mean((per_token > 0).float()),
            "lengths/chosen": _mean(lengths[0::2]),
            "lengths/rejected": _mean(lengths[1::2]),
        }


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
        metrics = {"baseline": _mean(shift.view(1))}
        for name, mask in (("chosen", labels), ("rejected", ~labels)):
            metrics[f"rewards/{name}"] = ((rewards * mask).sum(), mask.sum())
            metrics[f"logps/{name}"] = ((own.detach() * mask).sum(), mask.sum())
        metrics["rewards/accuracies"] = _mean(((rewards > 0) == labels).float())
        return losses.sum() / totals.items, metrics

    def _reward_shift(self, rewards: Tensor, labels: Tensor, training: bool) -> Tensor:
        """Half the sum of the running mean rewards of either label."""
        self.running = self.running.to(rewards.device)
        if training:
            for row, mask in enumerate((~labels, labels)):
                self.running[row] += torch.stack([(rewards * mask).sum().double(), mask.sum().double()])
        means = self.running[:, 0] / self.running[:, 1].clamp(min=1)
        return means.mean().to(rewards.dtype)


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.detach()
    return values.sum(), torch.full((), values.numel(), device=values.device)
