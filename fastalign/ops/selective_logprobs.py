"""Token log-probabilities from logits that already exist: the gather, for who has them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.errors import BackendError, InputError

BACKENDS = ("auto", "reference", "torch")
# Rows taken at a time are those that fill this many logits, so that no second [tokens, V] tensor ever exists.
_CHUNK = 1 << 22


class _SelectiveLogprobs(torch.autograd.Function):
    """`z_y - logsumexp(z)`; the backward pass rebuilds the softmax from the logits and the saved logsumexp."""

    @staticmethod
    def forward(ctx, logits, targets, temperature, ignore_index):
        dtype = reference.compute_dtype(logits)
        ignored = targets == ignore_index
        safe = targets.masked_fill(ignored, 0)
        lse = torch.empty(targets.shape, dtype=dtype, device=logits.device)
        logprobs = torch.empty_like(lse)
        for rows in _chunks(logits):
            z = logits[rows].to(dtype) / temperature
            torch.logsumexp(z, dim=1, out=lse[rows])
            logprobs[rows] = z.gather(1, safe[rows].unsqueeze(1)).squeeze(1) - lse[rows]
        ctx.save_for_backward(logits, safe, ignored, lse)
        ctx.temperature = temperature
        return logprobs.masked_fill_(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, safe, ignored, lse = ctx.saved_tensors
        scale = (grad / ctx.temperature).masked_fill(ignored, 0.0)
        d_logits = torch.empty_like(logits)
        for rows in _chunks(logits):
            p = (logits[rows].to(lse.dtype) / ctx.temperature).sub_(lse[rows].unsqueeze(1)).exp_()
            p = p.mul_(-scale[rows].unsqueeze(1))
            p.scatter_add_(1, safe[rows].unsqueeze(1), scale[rows].unsqueeze(1))
            d_logits[rows] = p.masked_fill_(ignored[rows].unsqueeze(1), 0.0)  # 0 * nan is nan
        return d_logits, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    n, vocab = logits.shape
    step = max(1, _CHUNK // max(vocab, 1))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def selective_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """`z_y - logsumexp(z)` with `z = logits / temperature`: the target's log-probability, in one chunked pass.

    logits: (..., V) floating. targets: (...) int64 in [0, V) or `ignore_index` (those return 0 and get no gradient).
    Returns (...) float32, or float64 for float64 logits; computed in that dtype whatever the logits' is. InputError
    names a wrong shape, dtype or target; BackendError an unknown backend.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; selective_logprobs has {', '.join(BACKENDS)}")
    if not logits.is_floating_point():
        raise InputError(f"logits is {logits.dtype}; it must be a floating dtype")
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:-1]:
        raise InputError(
            f"targets is {tuple(targets.shape)} {targets.dtype}; it must be int64 and shaped {tuple(logits.shape[:-1])}"
        )
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; it must be above 0")
    vocab = logits.shape[-1]
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if targets.device.type == "cpu" and outside.any():
        raise InputError(
            f"targets holds {targets[outside][0].item()}, but logits has {vocab} entries; give token ids in "
            f"[0, {vocab}) or ignore_index={ignore_index}"
        )
    if backend == "reference":
        return reference.selective_logprobs(logits, targets, temperature=temperature, ignore_index=ignore_index)
    flat = logits.reshape(-1, vocab)
    return _SelectiveLogprobs.apply(flat, targets.reshape(-1), float(temperature), ignore_index).view(targets.shape)
