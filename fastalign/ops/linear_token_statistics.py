"""What a trainer logs about each token beside its log-probability, from the same pass over the vocabulary.

One pass means: on the CPU, by the C++ kernels of `linear_logprobs`, which fold these numbers into the same tiles of
logits. Other backends take a second pass over the logits, some rows at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.ops.backends import cpu_head, pick
from fastalign.ops.backends.launch import without_autocast
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head.checks import (
    check_devices,
    check_linear,
    check_memory_budget,
    check_target_ids,
    check_targets,
    check_temperature,
)
from fastalign.ops.head.tiling import logit_rows, row_slices
from fastalign.ops.head.transform import LogitTransform
from fastalign.ops.linear_logprobs import DEFAULT_MEMORY_BUDGET, linear_logprobs


class TokenStatistics(NamedTuple):
    """What `linear_token_statistics` returns, each shaped like the targets, in float32 (float64 for float64 inputs).

    Attributes:
        logprobs: log p(y) of the target y in nats. Differentiable.
        entropy: -sum_j p_j log p_j in nats; None unless wanted. Differentiable.
        mean_logit: The mean of the logits over the vocabulary.
        log_sum_sq_probs: log sum_j p_j^2, the log of the probability that two samples are equal.
        is_top1: Bool: whether the target has the largest logit. Of several equal logits the first one counts.
    """

    logprobs: Tensor
    entropy: Tensor | None
    mean_logit: Tensor
    log_sum_sq_probs: Tensor
    is_top1: Tensor


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = True,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> TokenStatistics:
    """Log-probability, entropy, mean logit, log sum_j p_j^2 and top-1 of each token, from hidden states.

    With the logits z and p = softmax(z) of `linear_logprobs`. On the CPU everything comes from one pass. Unlike in
    `linear_logprobs`, the entropy's gradient is computed only if `backward` gets there. A caller who logs the entropy
    pays nothing for its gradient.

    Args:
        hidden: (..., H) floating.
        weight: (V, H) floating, the output layer's. A dtype other than hidden's: as for `linear_logprobs`.
        targets: (...) int64 in [0, V). Every row has one.
        bias: (V,) floating.
        logit_scale: Multiplies `h W' + b`.
        softcap: Bounds the logits before the temperature; above 0, or None.
        temperature: Divides the logits; above 0.
        entropy: Whether the entropies are wanted.
        memory_budget: As for `linear_logprobs`.
        backend: "auto", "cpu", "torch" or "reference", as for `linear_logprobs`. On a GPU "auto" takes the log-probs
            from the fastest kernels, and the rest from a second pass in torch.

    Returns:
        The statistics.

    Raises:
        InputError: A shape, dtype, device, target or option does not fit.
        BackendError: There is no such backend, or the backend that was named cannot run.

    Examples:
        >>> hidden, weight = torch.randn(6, 16), torch.randn(100, 16)
        >>> statistics = linear_token_statistics(hidden, weight, torch.tensor([3, 1, 4, 1, 5, 9]))
        >>> statistics.is_top1.shape
        torch.Size([6])
    """
    check_linear(hidden, weight, bias, softcap, logit_scale)
    check_targets(targets, hidden.shape[:-1], of="hidden")
    check_devices(hidden, weight, targets, bias)
    check_temperature(temperature)
    check_memory_budget(memory_budget)
    check_target_ids(targets, weight.shape[0], None, op="linear_token_statistics")
    resolved = pick.resolve(
        "linear_token_statistics", backend, hidden, weight, bias,
        backends=("auto", "reference", "torch", "cpu"), cpu_kernel="details",
    )  # fmt: skip
    common = torch.promote_types(hidden.dtype, weight.dtype)
    transform = LogitTransform(float(logit_scale), None if softcap is None else float(softcap), float(temperature))
    flat, flat_targets = hidden.to(common).reshape(-1, hidden.shape[-1]), targets.reshape(-1).contiguous()
    if resolved == "cpu":
        budget = DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget
        out = _Statistics.apply(flat, weight.to(common), flat_targets, bias, transform, entropy, budget)
        values = TokenStatistics(*out)
    else:
        values = _in_two_passes(flat, weight.to(common), flat_targets, bias, transform, entropy, memory_budget, backend)
    return TokenStatistics._make(None if value is None else value.view(targets.shape) for value in values)


class _Statistics(torch.autograd.Function):
    """The op over N rows on the CPU.

    A frozen output layer gets d logprob / d hidden (N, H) in the forward pass. A trainable one keeps probability tiles.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, transform: LogitTransform, entropy: bool, budget: int):
        ctx.set_materialize_grads(False)  # None says that nothing used the entropy
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        trainable = needs_weight or needs_bias
        cache_rows = 0
        if trainable:
            row_bytes = weight.shape[0] * hidden.element_size()
            cache_rows = cpu_head.cacheable_rows(len(targets), hidden.dtype, row_bytes, budget)
        details = hidden.new_empty(len(targets), 3, dtype=reference.compute_dtype(hidden))
        logprobs, entropies, grad, _, *kept = cpu_head.linear_logprobs(
            hidden, weight, targets, None, bias, transform, grads=needs_hidden and not trainable, entropy=entropy,
            cache_rows=cache_rows, entropy_grads=False, details=details,
        )  # fmt: skip
        ctx.transform, ctx.frozen = transform, needs_hidden and not trainable
        ctx.save_for_backward(hidden, weight, targets, bias, grad, *kept)
        mean_logit, log_sum_sq_probs, top1 = details.unbind(1)
        rest = mean_logit.contiguous(), log_sum_sq_probs.contiguous(), top1 > 0
        ctx.mark_non_differentiable(*rest)
        return logprobs, entropies if entropy else None, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs, d_entropy, *_):
        hidden, weight, targets, bias, grad, stats, cache, shifts = ctx.saved_tensors
        if ctx.frozen and d_entropy is None and d_logprobs is not None:
            return (grad * d_logprobs.unsqueeze(1)).to(hidden.dtype), *(None,) * 6
        if d_logprobs is None:
            d_logprobs = stats.new_zeros(len(targets))
        needs = ctx.needs_input_grad
        d_hidden, d_weight, d_bias = without_autocast(cpu_head.linear_logprobs_backward)(
            d_logprobs, d_entropy, hidden, weight, targets, None, bias, stats, cache, shifts, ctx.transform,
            (needs[0], needs[1], needs[3]),
        )  # fmt: skip
        return d_hidden, d_weight, None, d_bias, None, None, None


def _in_two_passes(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform, entropy: bool,
    memory_budget: int | None, backend: Backend,
) -> TokenStatistics:  # fmt: skip
    """The statistics by `linear_logprobs`, and by a look at the logits of some rows at a time, without gradient."""
    options = {"bias": bias, **transform._asdict()}
    out = linear_logprobs(
        hidden, weight, targets, ignore_index=None, entropy=entropy, memory_budget=memory_budget, backend=backend,
        **options,
    )  # fmt: skip
    logprobs, entropies = out if isinstance(out, tuple) else (out, None)
    details = logprobs.new_empty(3, len(targets))
    with torch.no_grad():
        for rows in row_slices(len(targets), logit_rows(weight.shape[0])):
            z = reference.linear_logits(hidden[rows], weight, **options)  # (R, V)
            details[0, rows] = z.mean(-1)
            details[1, rows] = (2 * torch.log_softmax(z, -1)).logsumexp(-1)
            details[2, rows] = (z.argmax(-1) == targets[rows]).to(details.dtype)
    return TokenStatistics(logprobs, entropies, details[0], details[1], details[2] > 0)
