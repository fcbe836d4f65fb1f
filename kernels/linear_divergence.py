"""The epilogue of `linear_divergence` in Triton: what fastalign/ops/head/divergence_terms.py does to tiles of logits.

There is one program per row, and the row lies in its registers. Three kernels follow each other:

- `normalise` turns products into logits, and folds them into the softmax's normaliser;
- `terms` reads student and teacher together, adds up the divergence, and leaves what the gradient is made of;
- `gradient` forms the gradient in the dtype of the last product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

START = tl.constexpr(-1e30)
TINY, EPS = tl.constexpr(1.1754943508222875e-38), tl.constexpr(1.1920928955078125e-07)
FORWARD_KL, REVERSE_KL, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


@triton.jit
def _tanh(x):
    """Tanh x, and x - tanh x, which keeps its digits where it is small: a series has converged there."""
    square = x * x
    near = tl.abs(x) < 0.25
    series = x * square * (1 / 3 + square * (-2 / 15 + square * (17 / 315 - square * (62 / 2835))))
    e = tl.exp(-2 * tl.abs(x))
    quotient = (1 - e) / (1 + e)
    far = tl.where(x < 0, -quotient, quotient)
    return tl.where(near, x - series, far), tl.where(near, series, x - far)


@triton.jit
def _log1p(x):
    """Log(1 + x) for x > -1, within a few ulp: what 1 + x rounds away is put back in proportion."""
    rounded = 1 + x
    lost = rounded == 1
    return tl.where(lost, x, tl.log(rounded) * (x / tl.where(lost, 1, rounded - 1)))


@triton.jit
def _normalise(
    z_ptr, stride, bias_ptr, factor, inner, outer, top_ptr, total_ptr, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """One row of `normalise`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    at = z_ptr + row * stride + column
    u = tl.load(at, mask=inside, other=0.0)
    if bias_ptr is not None:
        u = tl.maximum(u + tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32), START)
    z = u * factor if outer is None else _tanh(u * inner)[0] * outer
    tl.store(at, z, mask=inside)
    # Online softmax: the old sum is taken relative to the new maximum, then this tile is added.
    before, total = tl.load(top_ptr + row), tl.load(total_ptr + row)
    z = tl.where(inside, z, float("-inf"))
    top = tl.maximum(before, tl.max(z, 0))
    here = tl.sum(tl.exp(z - top), 0)
    tl.store(total_ptr + row, total * tl.exp(before - top) + here)
    tl.store(top_ptr + row, top)


@triton.jit
def _terms(
    a_ptr, a_stride, b_ptr, b_stride, stats_ptr, stats_stride, values_ptr, moments_ptr, beta, factor, outer, columns,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `terms`; stats (R, 5) begin with the maximum and the log-sum of the student, then of the teacher."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    a_ptr, b_ptr = a_ptr + row * a_stride + column, b_ptr + row * b_stride + column
    z = tl.load(a_ptr, mask=inside, other=0.0)
    of_row = stats_ptr + row * stats_stride
    # The two parts are subtracted one by one: their sum would be rounded to its own, larger size.
    log_s = (z - tl.load(of_row)) - tl.load(of_row + 1)
    log_t = (tl.load(b_ptr, mask=inside, other=0.0) - tl.load(of_row + 2)) - tl.load(of_row + 3)
    value, moment = tl.load(values_ptr + row), tl.load(moments_ptr + row)
    s, t = tl.exp(log_s), tl.exp(log_t)
    d = (log_t - log_s) * 0.5  # then t - s = (s + t) tanh d, without a difference of rounded exponentials
    tanh, rest = _tanh(d)
    near = tl.abs(d) < 0.25
    # An entry adds t log(t / s) - (t - s) to the forward KL and s log(s / t) - (s - t) to the reverse one. The second
    # terms add up to 0 over the vocabulary, and make every part 0 or more, so that no digits cancel in the sum.
    if KIND == FORWARD_KL:
        part = (s + t) * tl.where(near, d * tanh + rest, d * (1 + tanh) - tanh)
        left, right = -(s + t) * tanh, s
    elif KIND == REVERSE_KL:
        part = (s + t) * tl.where(near, d * tanh - rest, tanh - d * (1 - tanh))
        left, right = s, s * (-2 * d)
    else:
        # m = s + beta (t - s) and x = (t - s) / m give log(s / m) = log1p(-beta x), log(t / m) = log1p((1 - beta) x).
        difference = (s + t) * tanh
        x = difference / tl.maximum(s + beta * difference, TINY)
        right = s * _log1p(tl.maximum(-beta * x, EPS - 1))
        part = beta * t * _log1p(tl.maximum((1 - beta) * x, EPS - 1)) + (1 - beta) * right
        left = s
    tl.store(values_ptr + row, value + tl.sum(tl.where(inside, part, 0.0), 0))
    if KIND != FORWARD_KL:
        tl.store(moments_ptr + row, moment + tl.sum(tl.where(inside, right, 0.0), 0))
    if outer is not None:
        capped = tl.maximum(z / outer, -1)  # an entry that is ruled out has slope 0
        slope = factor * (1 - capped * capped)
        left *= slope
        right *= slope
    tl.store(a_ptr, left, mask=inside)
    if KIND != FORWARD_KL:
        tl.store(b_ptr, right, mask=inside)


@triton.jit
def _gradient(
    a_ptr, a_stride, b_ptr, b_stride, moments_ptr, scale, coefficients_ptr, out_ptr, out_stride, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `gradient`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    c = tl.load(a_ptr + row * a_stride + column, mask=inside, other=0.0)
    if b_ptr is not None:
        # The derivative of sum_i s_i r_i in z_j is s_j (r_j - K) with K = sum_i s_i r_i: b holds s r, and a holds s.
        b = tl.load(b_ptr + row * b_stride + column, mask=inside, other=0.0)
        c = b - tl.load(moments_ptr + row) * c
    c *= scale
    if coefficients_ptr is not None:
        c *= tl.load(coefficients_ptr + row)
    # Threads run at different times, and out may lie in memory of a that another thread has yet to read.
    tl.debug_barrier()
    tl.store(out_ptr + row * out_stride + column, c.to(out_ptr.dtype.element_ty), mask=inside)


def _shape(columns: int) -> dict[str, int]:
    """The block that holds a row of so many columns, and its warps."""
    block = max(16, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _outer(transform) -> float | None:
    return None if transform.softcap is None else transform.softcap / transform.temperature


def normalise(z: Tensor, bias: Tensor | None, transform, top: Tensor, total: Tensor) -> None:
    """Turn products z (R, T) float32 into logits in place, and fold them into the softmax's normaliser.

    Logits that the bias rules out become -1e30 and not -inf. top (R,) is the maximum so far and total (R,) is
    `sum exp(z - top)`; they start at START and 0.
    """
    rows, columns = z.shape
    inner = None if transform.softcap is None else transform.logit_scale / transform.softcap
    if rows:
        _normalise[(rows,)](
            z, z.stride(0), bias, transform.factor, inner, _outer(transform), top, total, columns, **_shape(columns)
        )


def terms(
    a: Tensor, b: Tensor, stats: Tensor, kind: str, beta: float, transform, values: Tensor, moments: Tensor
) -> None:
    """Add what a tile contributes to the divergences values (R,) and to their moments K (R,).

    a and b (R, T) hold the logits of student and teacher. They are overwritten with what the gradient is made of, times
    dz/du of a soft cap. For forward_kl: `s - t` in a. For reverse_kl and jsd: s in a, and s times its log-ratio to t or
    m in b. stats (R, 4 or more): the maximum and the log-sum of the student, then of the teacher.
    """
    rows, columns = a.shape
    if rows:
        _terms[(rows,)](
            a, a.stride(0), b, b.stride(0), stats, stats.stride(0), values, moments, beta, transform.factor,
            _outer(transform), columns, KIND=KINDS[kind], **_shape(columns),
        )  # fmt: skip


def gradient(
    a: Tensor, b: Tensor | None, moments: Tensor, scale: float, coefficients: Tensor | None, out: Tensor
) -> None:
    """`scale a`, or `scale (b - moments a)` where b is given, times coefficients (R,) if given.

    The result goes to out (R, T) in out's dtype. out may lie in the memory of a, row by row.
    """
    rows, columns = a.shape
    if rows:
        _gradient[(rows,)](
            a, a.stride(0), b, 0 if b is None else b.stride(0), moments, scale, coefficients, out, out.stride(0),
            columns, **_shape(columns),
        )  # fmt: skip


# What `make gpu-check` compiles, as launched for tiles of 4096 entries, with the budgets (see linear_logprobs.py).
CHECKS = [
    {
        "kernel": _normalise,
        "signature": "*fp32:16, i32:16, None, fp32, None, None, *fp32:16, *fp32:16, i32:16, 4096",
        "warps": 8,
        "budget": {"registers": 48, "shared": 64, "loads": 4, "stores": 4},
    },
    *(
        {
            "kernel": _terms,
            "variant": f" {kind}",
            "signature": "*fp32:16, i32:16, *fp32:16, i32:16, *fp32:16, i32, *fp32:16, *fp32:16, fp32, fp32, fp32, "
            f"i32:16, {number}, 4096",
            "warps": 8,
            "budget": {"registers": 128, "shared": 64, "loads": 8, "stores": 4 if number == 0 else 8},
        }
        for kind, number in KINDS.items()
    ),
    {
        "kernel": _gradient,
        "signature": "*fp32:16, i32:16, *fp32:16, i32:16, *fp32:16, fp32, *fp32:16, *bf16:16, i32:16, i32:16, 4096",
        "warps": 8,
        "budget": {"registers": 64, "shared": 0, "loads": 8, "stores": 2},
    },
]
