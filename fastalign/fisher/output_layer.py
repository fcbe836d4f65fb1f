"""The output layer's part of `fisher_diagonal`, without ever holding the logits.

The gradient of the negative log-likelihood in the logits is `p - onehot(target)`, so that in the weight it is
`(p - onehot)' h` per sample. It is recomputed one tile of the vocabulary at a time. The probabilities need the
logsumexp over the whole vocabulary, which follows from the forward pass: `logsumexp(z) = z_target - logprob`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.errors import ModelError
from fastalign.fisher.eight_bit import ByteSums, add_products_, add_rows_
from fastalign.models.adapters import is_trained_rows_name, unwrap_layer
from fastalign.models.head import Head
from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.head.transform import LogitTransform

# Vocabulary entries of one tile.
VOCAB_TILE = 512

# Gradients of a tied weight in its role as embedding: (sample (P,), token (P,), gradient of the token's row (P, H)) for
# every pair of a sample and a token that it has as input, sorted by sample.
Roles = tuple[Tensor, Tensor, Tensor]


class HeadFisher:
    """The parameters of the output layer and of the adapters on it, with their accumulators.

    Args:
        layer: the output layer, with what peft wrapped around it.
        names: of the trained parameters, by their id.
        fisher: accumulators by those names.
    """

    def __init__(self, layer: nn.Module, names: Mapping[int, str], fisher: Mapping[str, Tensor | ByteSums]):
        self.layer = layer
        plain, adapters = unwrap_layer(layer)
        rows = [name for name in names.values() if is_trained_rows_name(name)]
        if rows:
            raise ModelError(
                f"{rows[0]} holds trained rows of an embedding (trainable_token_indices), whose Fisher information is "
                "not computed: freeze them to measure the other parameters."
            )

        def accumulator(parameter: Tensor | None) -> Tensor | ByteSums | None:
            return fisher.get(names.get(id(parameter), ""))

        self.adapters = [
            _HeadAdapter(lora.a.detach(), lora.b.detach(), lora.scaling, accumulator(lora.a), accumulator(lora.b))
            for lora in adapters
        ]
        self.weight: Tensor = plain.weight
        self.weight_fisher = accumulator(self.weight)
        self.bias_fisher = accumulator(getattr(plain, "bias", None))

    def add(
        self, hidden: Tensor, targets: Tensor, logprobs: Tensor, head: Head, cu_seqlens: Tensor, share: float,
        roles: Roles | None,
    ) -> None:  # fmt: skip
        """Adds the squares of `(p - onehot)_s' h_s` for every sample s.

        Args:
            hidden: (N, H), of the scored tokens.
            targets: (N,) int64.
            logprobs: (N,), of the targets.
            head: the output layer.
            cu_seqlens: (samples + 1,) offsets of the samples into the N tokens.
            share: weight of each log-likelihood in the loss.
            roles: gradients of a tied weight in its role as embedding, to be added before squaring; None where the
                weight is not tied.
        """
        adapters = [part for part in self.adapters if part.a_fisher is not None or part.b_fisher is not None]
        if self.weight_fisher is None and self.bias_fisher is None and not adapters:
            return
        target_logits, _ = _logits_of_targets(hidden, head, targets)
        log_sum = target_logits - logprobs  # (N,), logsumexp(z)
        pairs = _Pairs(roles)
        # With weight + s B A, the gradient of B is (p - onehot)' (s h A'), that of A is (s (p - onehot) B)' h.
        down = [hidden.to(part.a.dtype) @ part.a.T * part.scaling for part in adapters]  # (N, r): s h A'
        back = [torch.zeros_like(d) for d in down]  # (N, r): s (p - onehot) B, summed over the tiles
        for start in range(0, head.weight.shape[0], VOCAB_TILE):
            tile = slice(start, min(start + VOCAB_TILE, head.weight.shape[0]))
            g = _gradient_tile(hidden, head, targets, log_sum, tile).mul_(share)  # (N, tile)
            if self.bias_fisher is not None:
                add_sums(self.bias_fisher[tile], g, cu_seqlens)
            for i, part in enumerate(adapters):
                if part.b_fisher is not None:
                    add_products_(part.b_fisher[tile], g, down[i], cu_seqlens)
                back[i].addmm_(g.to(part.b.dtype), part.b[tile], alpha=part.scaling)
            if self.weight_fisher is not None:
                pairs.leave_out(g, tile, cu_seqlens)
                add_products_(self.weight_fisher[tile], g, hidden, cu_seqlens)
        for part, g in zip(adapters, back, strict=True):
            if part.a_fisher is not None:
                add_products_(part.a_fisher, g, hidden, cu_seqlens)
        if self.weight_fisher is not None and roles is not None:
            self._add_both_roles(hidden, targets, log_sum, head, cu_seqlens.tolist(), share, roles)

    def _add_both_roles(
        self, hidden: Tensor, targets: Tensor, log_sum: Tensor, head: Head, bounds: list[int], share: float,
        roles: Roles,
    ) -> None:  # fmt: skip
        """Adds the rows of a tied weight whose tokens a sample has as inputs: `(embedding + output layer)^2`.

        A sample has few different tokens, so these rows are computed for one sample after another.
        """
        samples, tokens, sums = roles
        weight_fisher: Any = self.weight_fisher
        numbers, counts = torch.unique_consecutive(samples, return_counts=True)
        parts = zip(numbers.tolist(), tokens.split(counts.tolist()), sums.split(counts.tolist()), strict=True)
        for sample, inputs, embedding_gradient in parts:  # inputs (n,), embedding_gradient (n, H)
            gradient, span = embedding_gradient, slice(bounds[sample], bounds[sample + 1])
            if span.start < span.stop:
                h = hidden[span]
                g = _gradient_tile(h, head, targets[span], log_sum[span], inputs).mul_(share)
                gradient = gradient + g.T @ h.to(g.dtype)
            add_rows_(weight_fisher, inputs, gradient.square())


class _HeadAdapter(NamedTuple):
    """A LoRA adapter on the output layer, with the accumulators of its factors (None: not trained)."""

    a: Tensor  # (r, H)
    b: Tensor  # (V, r)
    scaling: float
    a_fisher: Tensor | ByteSums | None
    b_fisher: Tensor | ByteSums | None


class _Pairs:
    """The (token, sample) pairs in which a tied weight has a gradient as embedding too, sorted by token."""

    def __init__(self, roles: Roles | None):
        self.by_token: list[tuple[int, int]] = []
        if roles is not None:
            self.by_token = sorted(zip(roles[1].tolist(), roles[0].tolist(), strict=True))
        self.at = 0  # the first pair that no tile has reached

    def leave_out(self, g: Tensor, tile: slice, cu_seqlens: Tensor) -> None:
        """Zeroes the gradients of this tile's pairs: `_add_both_roles` adds them. Tiles must come in order."""
        if self.at == len(self.by_token):
            return
        bounds = cu_seqlens.tolist()
        while self.at < len(self.by_token) and self.by_token[self.at][0] < tile.stop:
            token, sample = self.by_token[self.at]
            g[bounds[sample] : bounds[sample + 1], token - tile.start] = 0.0
            self.at += 1


def _cap(u: Tensor, head: Head) -> tuple[Tensor, Tensor | float]:
    """The logits `z = softcap * tanh(logit_scale * u / softcap)` of `u = h W' + b`, and dz/du. Overwrites u."""
    transform = LogitTransform(head.logit_scale, head.softcap)
    z, slope = transform.logits_and_slope_(u)
    return z, transform.factor if slope is None else slope


def logits_tile(hidden: Tensor, head: Head, rows: slice | Tensor) -> tuple[Tensor, Tensor | float]:
    """The logits z (N, rows) of some of the vocabulary, in float32 or wider, and dz/du, see `_cap`.

    Args:
        hidden: (N, H).
        head: the output layer.
        rows: a slice of the vocabulary, or a tensor of token ids.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    u = hidden.to(wide) @ head.dense_weight[rows].to(wide).T
    return _cap(u if head.bias is None else u.add_(head.bias[rows].to(wide)), head)


def _logits_of_targets(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor | float]:
    """The logit (N,) of each row's target, and dz/du, see `_cap`."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    u = (hidden.to(wide) * head.dense_weight[targets].to(wide)).sum(1)
    return _cap(u if head.bias is None else u.add_(head.bias[targets].to(wide)), head)


def _gradient_tile(hidden: Tensor, head: Head, targets: Tensor, log_sum: Tensor, rows: slice | Tensor) -> Tensor:
    """d(-logprob)/du = (p - onehot) dz/du, (N, rows), for some of the vocabulary: a slice, or a tensor of token ids."""
    z, slope = logits_tile(hidden, head, rows)
    p = z.sub_(log_sum.unsqueeze(1)).exp_()
    if isinstance(rows, slice):
        inside = ((targets >= rows.start) & (targets < rows.stop)).nonzero().squeeze(1)
        p[inside, targets[inside] - rows.start] -= 1
    else:
        p -= (targets.unsqueeze(1) == rows).to(p.dtype)
    return p if isinstance(slope, float) and slope == 1.0 else p.mul_(slope)


def add_sums(fisher: Any, values: Tensor, bounds: Tensor) -> None:
    """`fisher += sum_s (sum of sample s's rows of values)^2`, for a bias or a norm's weight.

    A bias is a weight whose input is always 1, so this is `accumulate_fisher_` with a column of ones.

    Args:
        fisher: (n,), a tensor: accumulators of vectors are never in 8 bits.
        values: (T, n) gradients of single rows.
        bounds: (samples + 1,) offsets of the samples into the T rows.
    """
    accumulate_fisher_(fisher.unsqueeze(1), values, values.new_ones(values.shape[0], 1), bounds)
