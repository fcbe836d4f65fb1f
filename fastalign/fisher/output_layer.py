"""The output layer's Fisher information, whose logits are never held: its part of `fisher_diagonal`.

`(p - onehot) h'` is recomputed a tile of the vocabulary at a time, with the logsumexp that the forward pass left.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastalign.fisher.eight_bit import ByteSums, add_products_, add_rows_
from fastalign.models.head import Head
from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.head.transform import LogitTransform

# Vocabulary entries of one tile.
VOCAB_TILE = 512


class HeadFisher:
    """The output layer's parameters with their accumulators (None: not trained), adapters on it included."""

    def __init__(self, layer: nn.Module, names: Mapping[int, str], fisher: Mapping[str, Tensor | ByteSums]):
        self.layer = layer
        if hasattr(layer, "modules_to_save"):  # peft trains a copy of the whole layer
            layer = layer.modules_to_save[layer.active_adapters[0]]
        self.adapters = []
        if hasattr(layer, "base_layer"):
            for name in layer.active_adapters:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                found = [fisher.get(names.get(id(p))) for p in (a, b)]
                self.adapters.append((a.detach(), b.detach(), layer.scaling[name], *found))
            layer = layer.base_layer
        self.weight = layer.weight
        self.weight_fisher = fisher.get(names.get(id(layer.weight)))
        self.bias_fisher = fisher.get(names.get(id(getattr(layer, "bias", None))))

    def add(self, hidden, targets, logprobs, head: Head, cu_seqlens, share: float, roles) -> None:
        """Add the squares of (p - onehot)_s' h_s, a tile of the vocabulary at a time.

        hidden (N, H), targets and logprobs (N,): the scored tokens, sample s those from cu_seqlens[s] on. share: of
        each log-likelihood in the loss. roles: (sample, token, sum) of the embedding's gradients in rows of a shared
        weight, to be added before squaring; None where it is not shared.
        """
        adapters = [part for part in self.adapters if part[3] is not None or part[4] is not None]
        if self.weight_fisher is None and self.bias_fisher is None and not adapters:
            return
        rows, _ = _logits_of_targets(hidden, head, targets)
        log_sum = rows - logprobs  # logsumexp(z)
        pairs = _Pairs(roles, head.weight.shape[0])
        down = [hidden.to(a.dtype) @ a.T * scaling for a, _, scaling, _, _ in adapters]
        back = [torch.zeros_like(d) for d in down]
        for start in range(0, head.weight.shape[0], VOCAB_TILE):
            tile = slice(start, min(start + VOCAB_TILE, head.weight.shape[0]))
            g = _gradient_tile(hidden, head, targets, log_sum, tile).mul_(share)
            if self.bias_fisher is not None:
                add_sums(self.bias_fisher[tile], g, cu_seqlens)
            for i, (_, b, scaling, _, b_fisher) in enumerate(adapters):
                if b_fisher is not None:
                    add_products_(b_fisher[tile], g, down[i], cu_seqlens)
                back[i].addmm_(g.to(b.dtype), b[tile], alpha=scaling)
            if self.weight_fisher is not None:
                pairs.leave_out(g, tile, cu_seqlens)
                add_products_(self.weight_fisher[tile], g, hidden, cu_seqlens)
        for part, g in zip(adapters, back, strict=True):
            if part[3] is not None:
                add_products_(part[3], g, hidden, cu_seqlens)
        if self.weight_fisher is not None and roles is not None:
            self._add_both_roles(hidden, targets, log_sum, head, cu_seqlens.tolist(), share, roles)

    def _add_both_roles(self, hidden, targets, log_sum, head: Head, bounds: list[int], share: float, roles) -> None:
        """The rows of a shared weight that a sample has as inputs: few, so they are made one sample after another."""
        samples, tokens, sums = roles
        found, counts = torch.unique_consecutive(samples, return_counts=True)
        for s, own, row in zip(found.tolist(), tokens.split(counts.tolist()), sums.split(counts.tolist()), strict=True):
            part = slice(bounds[s], bounds[s + 1])
            if part.start < part.stop:
                h = hidden[part]
                g = _gradient_tile(h, head, targets[part], log_sum[part], own).mul_(share)
                row = row + g.T @ h.to(g.dtype)
            add_rows_(self.weight_fisher, own, row.square())


class _Pairs:
    """The (sample, token) pairs in which the embedding has a part, by token."""

    def __init__(self, roles, vocab: int):
        self.by_token: list[tuple[int, int]] = []
        if roles is not None:
            self.by_token = sorted(zip(roles[1].tolist(), roles[0].tolist(), strict=True))
        self.at = 0

    def leave_out(self, g: Tensor, tile: slice, cu_seqlens: Tensor) -> None:
        """Zero the gradients of this tile's pairs, to be added with the other role's; tiles come in order."""
        if self.at == len(self.by_token):
            return
        bounds = cu_seqlens.tolist()
        while self.at < len(self.by_token) and self.by_token[self.at][0] < tile.stop:
            token, sample = self.by_token[self.at]
            g[bounds[sample] : bounds[sample + 1], token - tile.start] = 0.0
            self.at += 1


def _cap(u: Tensor, head: Head) -> tuple[Tensor, Tensor | float]:
    """Logits z in place of `u = h W' + b`, and dz/du."""
    transform = LogitTransform(head.logit_scale, head.softcap)
    z, slope = transform.logits_and_slope_(u)
    return z, transform.factor if slope is None else slope


def logits_tile(hidden: Tensor, head: Head, rows) -> tuple[Tensor, Tensor | float]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    u = hidden.to(wide) @ head.weight[rows].to(wide).T
    return _cap(u if head.bias is None else u.add_(head.bias[rows].to(wide)), head)


def _logits_of_targets(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor | float]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    u = (hidden.to(wide) * head.weight[targets].to(wide)).sum(1)
    return _cap(u if head.bias is None else u.add_(head.bias[targets].to(wide)), head)


def _gradient_tile(hidden: Tensor, head: Head, targets: Tensor, log_sum: Tensor, rows) -> Tensor:
    """d(-logprob)/du = (p - onehot) dz/du for some of the vocabulary: a slice, or a tensor of token ids; (N, rows)."""
    z, slope = logits_tile(hidden, head, rows)
    p = z.sub_(log_sum.unsqueeze(1)).exp_()
    if isinstance(rows, slice):
        inside = ((targets >= rows.start) & (targets < rows.stop)).nonzero().squeeze(1)
        p[inside, targets[inside] - rows.start] -= 1
    else:
        p -= (targets.unsqueeze(1) == rows).to(p.dtype)
    return p if isinstance(slope, float) and slope == 1.0 else p.mul_(slope)


def add_sums(fisher: Tensor, values: Tensor, bounds: Tensor) -> None:
    """`fisher += sum_s (sum of sample s's rows of values)^2`: a weight whose input is 1."""
    accumulate_fisher_(fisher.unsqueeze(1), values, values.new_ones(values.shape[0], 1), bounds)
