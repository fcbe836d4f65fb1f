"""`selective_logprobs` in Triton: the target's log-probability from logits that exist, and its gradient.

Forward reads the logits once. Backward reads them once more and writes the gradient once, into their memory if
`in_place`. With m and `others` the maximum and the sum of exponentials of all entries except the target y, nothing
cancels near p_y = 1:

    x = z_y - m - log others      log p_y = -log(1 + exp(-x))      1 - p_y = 1 / (1 + exp(x))

The backward pass is given both m + log others and x, because one of its programs may have overwritten the target's
logit before another one needs it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

START = tl.constexpr(-1e30)  # far below any logit, yet finite
TINY = tl.constexpr(1.2e-38)
BLOCK = 4096
WARPS = 8


@triton.jit
def _log1p(x):
    """Log(1 + x) for x in [0, 1], within a few ulp: what 1 + x rounds away is put back in proportion."""
    rounded = 1 + x
    lost = rounded == 1
    return tl.where(lost, x, tl.log(rounded) * (x / tl.where(lost, 1, rounded - 1)))


@triton.jit
def _forward(
    logits_ptr, stride, targets_ptr, logprobs_ptr, stats_ptr, vocab, factor, ignore_index, BLOCK: tl.constexpr
):
    """One row of `selective_logprobs`, a block of logits after the other."""
    row = tl.program_id(0).to(tl.int64)
    at = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < vocab)
    # Online softmax in every lane: each has its own maximum and sum, so no reduction is needed per block. One
    # exponential serves both cases: that of the smaller of logit and maximum relative to the larger one.
    peaks = tl.zeros((BLOCK,), tl.float32) + START
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(at + column, mask=column < vocab, other=float("-inf")).to(tl.float32) * factor
        z = tl.where(column == target, float("-inf"), z)
        e = tl.exp(-tl.abs(z - peaks))
        sums = tl.where(z > peaks, sums * e + 1, sums + e)
        peaks = tl.maximum(peaks, z)
    peak = tl.max(peaks, 0)
    # Where the vocabulary has no other entry, the sum counts as the smallest one there is, so that p = 1.
    log_others = tl.log(tl.maximum(tl.sum(sums * tl.exp(peaks - peak), 0), TINY))
    z_y = tl.load(at + target, mask=inside & (target != ignore_index), other=0.0).to(tl.float32) * factor
    # A logit that overflowed to +inf must not look like a certain target.
    odds = tl.where(z_y == float("inf"), float("nan"), (z_y - peak) - log_others)
    logprob = tl.minimum(odds, 0) - _log1p(tl.exp(-tl.abs(odds)))
    logprob = tl.where(target == ignore_index, 0.0, tl.where(inside, logprob, float("nan")))
    tl.store(logprobs_ptr + row, logprob)
    tl.store(stats_ptr + 2 * row, peak + log_others)
    tl.store(stats_ptr + 2 * row + 1, odds)


@triton.jit
def _backward(
    grad_ptr, logits_ptr, stride, targets_ptr, stats_ptr, out_ptr, out_stride, vocab, factor, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row of `selective_logprobs_backward`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    scored = (target != ignore_index) & (target >= 0) & (target < vocab)
    # Ignored rows are not even read: whatever is in them, their gradient is 0.
    readable = tl.where(scored, vocab, 0)
    z = tl.load(logits_ptr + row * stride + column, mask=column < readable, other=0.0).to(tl.float32) * factor
    # d log p_y / d z_j = [j = y] - p_j, and p_j = (1 - p_y) exp(z_j - logsumexp of the others) for j other than y. So
    # every entry is a multiple of 1 - p_y, which `odds` gives with all its digits even where p_y is near 1.
    miss = tl.load(grad_ptr + row) * factor / (1 + tl.exp(tl.load(stats_ptr + 2 * row + 1)))
    d = tl.where(column == target, miss, -miss * tl.exp(z - tl.load(stats_ptr + 2 * row)))
    d = tl.where(scored, d, 0.0)
    tl.store(out_ptr + row * out_stride + column, d.to(out_ptr.dtype.element_ty), mask=column < vocab)


def selective_logprobs(logits: Tensor, targets: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """`z_y - logsumexp(z)` with `z = logits / temperature`: logits (N, V), targets (N,) -> logprobs (N,), stats (N, 2).

    A log-probability is 0 where the target is `ignore_index`, NaN where it is outside the vocabulary. stats: the
    logsumexp of the other logits, and the target's logit minus that.
    """
    logits, targets = _rows(logits), targets.contiguous()
    rows, vocab = logits.shape
    logprobs, stats = logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, 2, dtype=torch.float32)
    if rows:
        _forward[(rows,)](
            logits, logits.stride(0), targets, logprobs, stats, vocab, 1 / temperature, ignore_index,
            BLOCK=_block(vocab), num_warps=WARPS,
        )  # fmt: skip
    return logprobs, stats


def selective_logprobs_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    temperature: float,
    ignore_index: int,
    *,
    in_place: bool = False,
) -> Tensor:
    """`grad (onehot - p) / temperature` (N, V) in the logits' dtype; with `in_place` in the memory of the logits.

    It is 0 for rows whose target is `ignore_index` or outside the vocabulary.
    """
    read = _rows(logits)
    out = logits if in_place and read is logits else torch.empty_like(read, memory_format=torch.contiguous_format)
    rows, vocab = read.shape
    if rows:
        block = _block(vocab)
        _backward[(rows, triton.cdiv(vocab, block))](
            grad.to(torch.float32).contiguous(), read, read.stride(0), targets.contiguous(), stats, out, out.stride(0),
            vocab, 1 / temperature, ignore_index, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return logits.copy_(out) if in_place and out is not logits else out


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _block(vocab: int) -> int:
    return min(BLOCK, max(16, triton.next_power_of_2(vocab)))


# What `make gpu-check` compiles, as it is launched for a large vocabulary, with the budgets (see linear_logprobs.py).
CHECKS = [
    {
        "kernel": _forward,
        "signature": "*bf16:16, i32:16, *i64:16, *fp32:16, *fp32:16, i32:16, fp32, i32, 4096",
        "warps": WARPS,
        "budget": {"registers": 80, "shared": 64, "loads": 2},
    },
    {
        "kernel": _backward,
        "signature": "*fp32:16, *bf16:16, i32:16, *i64:16, *fp32:16, *bf16:16, i32:16, i32:16, fp32, i32, 4096",
        "warps": WARPS,
        "budget": {"registers": 40, "shared": 0, "loads": 2, "stores": 2},
    },
]
