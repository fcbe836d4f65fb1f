"""`preference_loss` in Triton: from token log-probs to losses, rewards and each token's coefficient in one launch.

There is one program per pair (or labelled completion). It sums both sequences, forms loss and derivative, and writes
the coefficients. The sums are few, so they and the formulas are in float64, in an order that only a sequence's length
decides. Offsets that do not rise from 0 to the number of tokens read and write nothing outside of the tensors: their
sums, and so the losses, are NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# `Form` of fastalign/ops/preference_loss.py; 0, LOGISTIC, is what is left.
SQUARE, HINGE, ODDS, KTO = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
# An average log-probability that has rounded to 0 counts as the largest normal float32 below 0, with no gradient.
HIGHEST = tl.constexpr(-1.1754943508222875e-38)
BLOCK = 256
WARPS = 4


@triton.jit
def _log1p(x):
    """Log(1 + x) within a few ulp: what 1 + x rounds away is put back in proportion."""
    rounded = 1 + x
    lost = rounded == 1
    return tl.where(lost, x, tl.log(rounded) * (x / tl.where(lost, 1, rounded - 1)))


@triton.jit
def _expm1(x):
    """Exp(x) - 1 for x <= 0, within a few ulp, by the same trick."""
    e = tl.exp(x)
    lost, gone = e == 1, e < 0.25
    safe = tl.where(lost | gone, 0.5, e)
    return tl.where(lost, x, tl.where(gone, e - 1, (safe - 1) * (x / tl.log(safe))))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _span(offsets_ptr, i, sequences, tokens):
    """The tokens [begin, end) of a sequence, empty where its offsets are wrong, and whether they are right."""
    begin, end = tl.load(offsets_ptr + i), tl.load(offsets_ptr + i + 1)
    right = (begin >= 0) & (begin <= end) & (end <= tokens)
    right = right & ((i > 0) | (begin == 0)) & ((i < sequences - 1) | (end == tokens))
    return begin, tl.where(right, end, begin), right


@triton.jit
def _ratio(
    i, begin, end, right, logprobs_ptr, ref_ptr, lengths_ptr, rewards_ptr, sums_ptr, beta,
    AVERAGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The log-ratio that the loss is a function of, and the length it was divided by."""
    # One partial sum per lane, and one reduction at the end: the order of additions depends on the length alone.
    parts = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        parts += tl.load(logprobs_ptr + at, mask=at < end, other=0.0).to(tl.float64)
    total = tl.where(right, tl.sum(parts, 0), float("nan"))
    tl.store(sums_ptr + i, total.to(tl.float32))
    if ref_ptr is not None:
        total -= tl.load(ref_ptr + i).to(tl.float64)
    tl.store(rewards_ptr + i, (beta * total).to(tl.float32))
    length = tl.full((), 1.0, tl.float64)
    if AVERAGED:
        counted = end - begin if lengths_ptr is None else tl.load(lengths_ptr + i)
        length = tl.maximum(counted.to(tl.float64), 1)
    return total / length, length


@triton.jit
def _pair_loss(u, v, scale, offset, slope, FORM: tl.constexpr):
    """The loss, and its derivatives in u and v."""
    if FORM == ODDS:
        # The log odds of a completion are u - log(1 - e^u), with the derivative -1 / expm1(u).
        a, b = tl.minimum(u, HIGHEST), tl.minimum(v, HIGHEST)
        odds_a, odds_b = _expm1(a), _expm1(b)
        x = (a - tl.log(-odds_a)) - (b - tl.log(-odds_b))
        falling = scale * _sigmoid(-x)
        loss = scale * _softplus(-x) + 0 * (u + v)  # a NaN stays one
        d_u = tl.where(u > HIGHEST, 0, falling / odds_a)
        d_v = tl.where(v > HIGHEST, 0, -falling / odds_b)
    else:
        x = scale * (u - v) - offset
        if FORM == SQUARE:
            loss, d_x = x * x, 2 * x
        elif FORM == HINGE:
            loss, d_x = tl.where((x < 0) | (x != x), -x, 0), tl.where(x < 0, -1.0, 0.0)
        else:
            # Label smoothing: (1 - eps) softplus(-x) + eps softplus(x) = softplus(-x) + eps x, with eps as the slope.
            loss, d_x = _softplus(-x) + slope * x, slope - _sigmoid(-x)
        d_u = d_x * scale
        d_v = -d_u
    return loss, d_u, d_v


@triton.jit
def _fill(out_ptr, begin, end, value, BLOCK: tl.constexpr):
    """Write the value to all tokens [begin, end)."""
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, tl.zeros((BLOCK,), tl.float32) + value.to(tl.float32), mask=at < end)


@triton.jit
def _loss(
    logprobs_ptr, offsets_ptr, ref_ptr, lengths_ptr, labels_ptr, kl_ptr, losses_ptr, rewards_ptr, sums_ptr, out_ptr,
    sequences, tokens, items, beta, scale, offset, slope,
    FORM: tl.constexpr, AVERAGED: tl.constexpr, ALTERNATING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair or labelled completion of `preference_loss`."""
    item = tl.program_id(0)
    first = item * 2 if FORM != KTO and ALTERNATING else item
    begin, end, right = _span(offsets_ptr, first, sequences, tokens)
    u, length = _ratio(
        first, begin, end, right, logprobs_ptr, ref_ptr, lengths_ptr, rewards_ptr, sums_ptr, beta, AVERAGED, BLOCK
    )
    if FORM == KTO:
        desirable = tl.load(labels_ptr + first) != 0
        x = scale * (u - tl.load(kl_ptr)) * tl.where(desirable, 1.0, -1.0)
        weight = tl.where(desirable, offset, slope)
        loss = weight * _sigmoid(-x)
        d_u = -loss * _sigmoid(x) * scale * tl.where(desirable, 1.0, -1.0)
    else:
        second = item * 2 + 1 if ALTERNATING else item + items
        begin_v, end_v, right_v = _span(offsets_ptr, second, sequences, tokens)
        v, length_v = _ratio(
            second, begin_v, end_v, right_v, logprobs_ptr, ref_ptr, lengths_ptr, rewards_ptr, sums_ptr, beta,
            AVERAGED, BLOCK,
        )  # fmt: skip
        loss, d_u, d_v = _pair_loss(u, v, scale, offset, slope, FORM)
        _fill(out_ptr, begin_v, end_v, d_v / length_v, BLOCK)
    tl.store(losses_ptr + item, loss.to(tl.float32))
    _fill(out_ptr, begin, end, d_u / length, BLOCK)


@triton.jit
def _backward(
    grad_losses_ptr, grad_sums_ptr, coefficients_ptr, offsets_ptr, out_ptr, sequences, tokens, items,
    ALTERNATING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence of the gradient: grad[t] = grad_losses[item of t] * coefficients[t] + grad_sums[sequence of t]."""
    i = tl.program_id(0)
    item = tl.where(items == sequences, i, i // 2 if ALTERNATING else i % items)
    begin, end, _ = _span(offsets_ptr, i, sequences, tokens)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        grad = tl.zeros((BLOCK,), tl.float32)
        if grad_losses_ptr is not None:
            grad += tl.load(coefficients_ptr + at, mask=at < end, other=0.0) * tl.load(grad_losses_ptr + item)
        if grad_sums_ptr is not None:
            grad += tl.load(grad_sums_ptr + i)
        tl.store(out_ptr + at, grad, mask=at < end)


def preference_loss(
    logprobs: Tensor,
    cu_seqlens: Tensor,
    ref_sums: Tensor | None,
    lengths: Tensor | None,
    labels: Tensor | None,
    kl: Tensor | None,
    form: int,
    averaged: bool,
    alternating: bool,
    beta: float,
    scale: float,
    offset: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward op of fastalign/ops/preference_loss.py in float32: losses, rewards, sums, coefficients."""
    sequences = cu_seqlens.shape[0] - 1
    items = sequences // 2 if labels is None else sequences
    losses, rewards, sums, coefficients = (
        logprobs.new_empty(count) for count in (items, sequences, sequences, logprobs.shape[0])
    )
    inputs = [None if t is None else t.contiguous() for t in (logprobs, cu_seqlens, ref_sums, lengths)]
    if items:
        _loss[(items,)](
            *inputs, None if labels is None else labels.contiguous().view(torch.uint8), kl, losses, rewards, sums,
            coefficients, sequences, logprobs.shape[0], items, beta, scale, offset, slope,
            FORM=form, AVERAGED=averaged, ALTERNATING=alternating, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return losses, rewards, sums, coefficients


def preference_loss_backward(
    grad_losses: Tensor | None,
    grad_sums: Tensor | None,
    coefficients: Tensor,
    cu_seqlens: Tensor,
    items: int,
    alternating: bool,
) -> Tensor:
    """The backward op of fastalign/ops/preference_loss.py."""
    grads = [None if t is None else t.contiguous() for t in (grad_losses, grad_sums)]
    sequences, out = cu_seqlens.shape[0] - 1, torch.empty_like(coefficients)
    if sequences:
        _backward[(sequences,)](
            *grads, coefficients, cu_seqlens.contiguous(), out, sequences, coefficients.shape[0], items,
            ALTERNATING=alternating, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


# What `make gpu-check` compiles, with the budgets (see linear_logprobs.py). Only some thousand tokens are moved, so
# what counts is that there is one launch.
_COUNTS = "i32, i32, i32, fp32, fp32, fp32, fp32"
_FOUR = "*fp32:16, *fp32:16, *fp32:16, *fp32:16"
CHECKS = [
    {
        "kernel": _loss,
        "variant": variant,
        "signature": f"*fp32:16, *i64:16, {ref}, None, {labels}, {_FOUR}, {_COUNTS}, {form}, {averaged}, True, {BLOCK}",
        "warps": WARPS,
        "budget": {"registers": 80, "shared": 64},
    }
    for variant, ref, labels, form, averaged in (
        (" dpo", "*fp32:16", "None, None", 0, False),
        (" orpo", "None", "None, None", 3, True),
        (" kto", "*fp32:16", "*i8:16, *fp32:16", 4, False),
    )
] + [
    {
        "kernel": _backward,
        "signature": f"*fp32:16, None, *fp32:16, *i64:16, *fp32:16, i32, i32, i32, True, {BLOCK}",
        "warps": WARPS,
        "budget": {"registers": 40, "shared": 0},
    }
]
