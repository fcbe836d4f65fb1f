"""The epilogue of `linear_logprobs` in Triton: what fastalign/ops/head/epilogue.py defines, in one read of each tile.

There is one program per row. The whole row of the tile lies in its registers before anything is stored, so that outputs
may lie in the memory of the tile itself. The widest tiles give each thread 32 elements, which take some 60 registers.

Letters: R tokens, T vocabulary entries of a tile, H the width of hidden states. Names as in epilogue.py: u products, z
logits, e their exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Where the kernels of this process run: Triton decides it when a kernel is decorated.
DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
START = tl.constexpr(-1e30)
# Lazy rescaling: the shift stays where it is until the running maximum exceeds it by this much. Exponentials may then
# be as large as e^8. That costs float32 no precision, and the accumulated products (R, H) are hardly ever rescaled.
LAG = tl.constexpr(8.0)
# How many entries of a row of the accumulated products are rescaled at a time.
WIDTH = tl.constexpr(1024)


@triton.jit
def _tanh(x):
    """Tanh, within a few ulp.

    Near 0 the numerator 1 - e of the quotient would lose its digits. For |x| < 0.25 the Taylor series is used instead;
    its next term is too small for float32.
    """
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    quotient = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _log1p(x):
    """Log(1 + x) for x >= 0, within a few ulp. The factor x / ((1 + x) - 1) makes up for the rounding of 1 + x."""
    rounded = 1 + x
    lost = rounded == 1
    return tl.where(lost, x, tl.log(rounded) * (x / tl.where(lost, 1, rounded - 1)))


@triton.jit
def _logit(u, factor, inner, outer):
    """The logit of a product. inner is logit_scale / softcap and outer softcap / temperature; None without a cap."""
    return u * factor if outer is None else _tanh(u * inner) * outer


@triton.jit
def _slope(z, factor, outer):
    """The slope dz/du of a soft cap, from the logit."""
    t = tl.maximum(z / outer, -1)  # entries set to -inf count as the cap's lower end
    return factor * (1 - t * t)


@triton.jit
def _absorb(  # noqa: C901 - a kernel is one pass over its row, and its branches are decided when it is compiled
    u_ptr, u_stride, targets_ptr, first, bias_ptr, factor, inner, outer,
    shift_ptr, others_ptr, zothers_ptr, target_ptr, e_ptr, e_stride, ze_ptr, ze_stride,
    a_ptr, a_stride, b_ptr, b_stride, best_ptr, argmax_ptr, columns, width,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `absorb`: its running sums take in the tile, and e and ze are left for the next products."""
    row = tl.program_id(0).to(tl.int64)  # int64: a row's offset may exceed 2^31 elements
    column = tl.arange(0, BLOCK)  # (T,) padded to a power of two
    inside = column < columns
    target = tl.load(targets_ptr + row) - first
    has_target = (target >= 0) & (target < columns)
    # The target's own logit is read before anything is stored over it.
    u_y = tl.load(u_ptr + row * u_stride + target, mask=has_target, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride + column, mask=inside, other=0.0).to(tl.float32)  # (T,)
    if bias_ptr is not None:
        u_y += tl.load(bias_ptr + target, mask=has_target, other=0.0).to(tl.float32)
        u += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(target_ptr + row, _logit(u_y, factor, inner, outer), mask=has_target)
    z = tl.where(inside, _logit(u, factor, inner, outer), float("-inf"))

    top = tl.max(z, 0)  # of this tile
    if best_ptr is not None:
        best = tl.load(best_ptr + row)
        tl.store(argmax_ptr + row, tl.argmax(z, 0).to(tl.int64) + first, mask=top > best)
        tl.store(best_ptr + row, top, mask=top > best)
    # Online softmax: sums relative to the old shift become sums relative to the new one, then this tile is added.
    old = tl.load(shift_ptr + row)
    shift = tl.where(top > old + LAG, top, old)
    shift_change = old - shift
    shrink = tl.exp(shift_change)
    e = tl.where(column == target, 0.0, tl.exp(z - shift))  # (T,); the target is left out of every sum
    others = tl.load(others_ptr + row)
    tl.store(others_ptr + row, shrink * others + tl.sum(e, 0))
    tl.store(shift_ptr + row, shift)
    if ENTROPY:
        # e (z - old) becomes shrink e (z - old + shift_change), so the second sum also takes a part of the first one.
        zothers = tl.load(zothers_ptr + row)
        here = tl.sum(tl.maximum(z - shift, START) * e, 0)
        tl.store(zothers_ptr + row, shrink * (zothers + shift_change * others) + here)
    if outer is not None:
        e *= _slope(z, factor, outer)
    if e_ptr is not None:
        tl.store(e_ptr + row * e_stride + column, e.to(e_ptr.dtype.element_ty), mask=inside)
    if ze_ptr is not None:  # z - shift is computed again, because registers are scarcer than arithmetic
        ze = tl.maximum(z - shift, START) * e
        tl.store(ze_ptr + row * ze_stride + column, ze.to(ze_ptr.dtype.element_ty), mask=inside)
    if a_ptr is not None:  # noqa: SIM102 - this is known when the kernel is compiled, the next condition is not
        if (old > START) & (shift > old):
            for start in range(0, width, WIDTH):
                at = start + tl.arange(0, WIDTH)
                a = tl.load(a_ptr + row * a_stride + at, mask=at < width, other=0.0)
                if b_ptr is not None:
                    b = tl.load(b_ptr + row * b_stride + at, mask=at < width, other=0.0)
                    tl.store(b_ptr + row * b_stride + at, shrink * (b + shift_change * a), mask=at < width)
                tl.store(a_ptr + row * a_stride + at, shrink * a, mask=at < width)


@triton.jit
def _finish(
    weight_ptr, weight_stride, targets_ptr, factor, inner, outer,
    shift_ptr, others_ptr, zothers_ptr, target_ptr, logprobs_ptr, entropy_ptr, stats_ptr, rows,
    a_ptr, a_stride, b_ptr, b_stride, width,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `finish`; stats (3, R) are the fields target, slope and mean of `Stats`."""
    row = tl.program_id(0).to(tl.int64)
    shift, others, z_y = tl.load(shift_ptr + row), tl.load(others_ptr + row), tl.load(target_ptr + row)
    shifted = z_y - shift
    at_target = tl.exp(shifted)
    total = others + at_target
    # log1p keeps the digits of a log-probability near 0; far below the maximum its argument would overflow.
    near = -_log1p(others * tl.exp(tl.minimum(-shifted, 30)))
    tl.store(logprobs_ptr + row, tl.where(shifted > -30, near, shifted - tl.log(total)))
    mean = total * 0
    entropy = mean
    if ENTROPY:
        mean = (tl.load(zothers_ptr + row) + at_target * tl.maximum(shifted, START)) / total
        entropy = tl.log(total) - mean
    if outer is None:
        slope = mean * 0 + factor
        scale = factor / total
    else:
        slope = _slope(z_y, factor, outer)
        scale = 1 / total
    tl.store(entropy_ptr + row, entropy)
    tl.store(stats_ptr + row, at_target)
    tl.store(stats_ptr + rows + row, slope)
    tl.store(stats_ptr + 2 * rows + row, mean)
    if a_ptr is not None:
        # With d_j = z_j - shift and m_j = dz_j / du_j:
        #     d log p(y) / d hidden = (1 - p_y) m_y W[y] - sum_{j != y} p_j m_j W[j]
        #     d entropy / d hidden = -sum_j p_j (d_j - mean) m_j W[j]
        # `a` and `b` hold sum e_j m_j W[j] and sum e_j d_j m_j W[j] without the target (without a cap also without the
        # constant m_j). So they are scaled by 1 / total, and the target's part is added. 1 - p_y is others / total: as
        # a difference it would lose its digits near p_y = 1.
        target = tl.load(targets_ptr + row)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            w_y = tl.load(weight_ptr + target * weight_stride + at, mask=at < width, other=0.0).to(tl.float32)
            a = tl.load(a_ptr + row * a_stride + at, mask=at < width, other=0.0) * scale
            if b_ptr is not None:
                b = tl.load(b_ptr + row * b_stride + at, mask=at < width, other=0.0) * scale
                of_target = at_target * slope * (tl.maximum(shifted, START) - mean) / total
                tl.store(b_ptr + row * b_stride + at, mean * a - b - of_target * w_y, mask=at < width)
            tl.store(a_ptr + row * a_stride + at, others / total * slope * w_y - a, mask=at < width)


@triton.jit
def _softmax_gradient(
    u_ptr, u_stride, targets_ptr, first, bias_ptr, factor, inner, outer,
    shift_ptr, mean_ptr, logprob_factor_ptr, entropy_factor_ptr, target_ptr, du_ptr, du_stride, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `softmax_gradient`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    u = tl.load(u_ptr + row * u_stride + column, mask=inside, other=0.0).to(tl.float32)  # (T,)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    z = _logit(u, factor, inner, outer)
    d = z - tl.load(shift_ptr + row)
    g = tl.load(logprob_factor_ptr + row)
    if entropy_factor_ptr is not None:
        g += tl.load(entropy_factor_ptr + row) * (tl.maximum(d, START) - tl.load(mean_ptr + row))
    g *= tl.exp(d)
    if outer is None:
        g *= factor
    else:
        g *= _slope(z, factor, outer)
    du = tl.where(column == tl.load(targets_ptr + row) - first, tl.load(target_ptr + row), g)
    # Threads run at different times, and du may lie in memory of u that another thread has yet to read.
    tl.debug_barrier()
    tl.store(du_ptr + row * du_stride + column, du.to(du_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _kept_gradient(
    kept_ptr, kept_stride, targets_ptr, first, scale_ptr, target_ptr, du_ptr, du_stride, columns, BLOCK: tl.constexpr
):
    """One row of `kept_gradient`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    kept = tl.load(kept_ptr + row * kept_stride + column, mask=inside, other=0.0).to(tl.float32)  # (T,)
    du = kept * tl.load(scale_ptr + row)
    du = tl.where(column == tl.load(targets_ptr + row) - first, tl.load(target_ptr + row), du)
    tl.store(du_ptr + row * du_stride + column, du.to(du_ptr.dtype.element_ty), mask=inside)


def _shape(columns: int) -> dict[str, int]:
    """The block that holds a row of so many columns, and its warps: 16 elements per thread, 32 in the widest."""
    block = max(16, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _numbers(transform) -> tuple[float, float | None, float | None]:
    """The kernels' factor, inner and outer."""
    if transform.softcap is None:
        return transform.factor, None, None
    return transform.factor, transform.logit_scale / transform.softcap, transform.softcap / transform.temperature


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def absorb(
    u: Tensor,
    targets: Tensor,
    first: int,
    bias: Tensor | None,
    transform,
    sums,
    *,
    entropy: bool = False,
    e: Tensor | None = None,
    ze: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    best: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fold a tile into the running sums, as fastalign/ops/head/epilogue.py says.

    Args:
        u: (R, T) float32 products.
        targets: (R,) int64.
        first: The vocabulary entry of the tile's first column.
        bias: (T,) or None.
        transform: From products to logits.
        sums: Four float32 tensors (R,), updated in place.
        entropy: Whether `sums.zothers` is wanted.
        e: (R, T) or None, in any floating dtype; may lie in the memory of u.
        ze: (R, T) or None, in any floating dtype; may lie in the memory of u, but not of e.
        a: (R, H) float32 or None, rescaled in place.
        b: (R, H) float32 or None, rescaled in place.
        best: Running (largest logit (R,) float32, its vocabulary entry (R,) int64), or None.
    """
    rows, columns = u.shape
    if rows:
        _absorb[(rows,)](
            u, u.stride(0), targets, first, bias, *_numbers(transform), sums.shift, sums.others, sums.zothers,
            sums.target, e, _stride(e), ze, _stride(ze), a, _stride(a), b, _stride(b), *(best or (None, None)),
            columns, 0 if a is None else a.shape[1], ENTROPY=entropy, **_shape(columns),
        )  # fmt: skip


def finish(
    weight: Tensor,
    targets: Tensor,
    transform,
    sums,
    *,
    entropy: bool = False,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of R rows, as fastalign/ops/head/epilogue.py says: log-probs (R,), entropies (R,) and stats (3, R).

    Stats are the fields target, slope and mean of `Stats`. a and b become gradients.
    """
    rows, width = targets.shape[0], 0 if a is None else a.shape[1]
    logprobs, entropies, stats = (sums.shift.new_empty(*shape) for shape in ((rows,), (rows,), (3, rows)))
    block = min(WIDTH.value, max(16, triton.next_power_of_2(width)))
    if rows:
        _finish[(rows,)](
            weight, weight.stride(0), targets, *_numbers(transform), *sums, logprobs, entropies, stats, rows, a,
            _stride(a), b, _stride(b), width, ENTROPY=entropy, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return logprobs, entropies, stats


def softmax_gradient(u: Tensor, targets: Tensor, first: int, bias: Tensor | None, transform, c, du: Tensor) -> None:
    """The gradient in u of a tile, from its products, as fastalign/ops/head/epilogue.py says.

    Args:
        u: (R, T) float32 products.
        targets: (R,) int64.
        first: The vocabulary entry of the tile's first column.
        bias: (T,) or None.
        transform: From products to logits.
        c: `Coefficients`, each (R,) float32.
        du: (R, T) in any floating dtype, receives the gradient; may lie in the memory of u.
    """
    rows, columns = u.shape
    if rows:
        _softmax_gradient[(rows,)](
            u, u.stride(0), targets, first, bias, *_numbers(transform), *c, du, du.stride(0), columns, **_shape(columns)
        )


def kept_gradient(kept: Tensor, targets: Tensor, first: int, scale: Tensor, target: Tensor, du: Tensor) -> None:
    """The gradient in u of a tile, from the exponentials that `absorb` stored, as fastalign/ops/head/epilogue.py says.

    Args:
        kept: (R, T) in any floating dtype, what `absorb` stored in e.
        targets: (R,) int64.
        first: The vocabulary entry of the tile's first column.
        scale: (R,) float32, what a row is multiplied with.
        target: (R,) float32, the gradient at the target.
        du: (R, T) in any floating dtype, receives the gradient.
    """
    rows, columns = kept.shape
    if rows:
        _kept_gradient[(rows,)](
            kept, kept.stride(0), targets, first, scale, target, du, du.stride(0), columns, **_shape(columns)
        )


# What `make gpu-check` compiles, as it is launched for tiles of 16384 entries. A budget has these limits:
# - registers: the most registers per thread;
# - shared: the most bytes of shared memory;
# - loads, stores: the fewest 16-byte loads and 16-byte stores that the compiled kernel must have.
_SUMS, _COEFFICIENTS = ", ".join(["*fp32:16"] * 4), ", ".join(["*fp32:16"] * 5)
_UNCAPPED, _CAPPED = "fp32, None, None", "fp32, fp32, fp32"
CHECKS = [
    {
        "kernel": _absorb,
        "variant": " frozen",
        "signature": f"*fp32:16, i32:16, *i64:16, i32:16, None, {_UNCAPPED}, {_SUMS}, "
        "*bf16:16, i32:16, None, 0, *fp32:16, i32:16, None, 0, None, None, i32:16, i32:16, False, 16384",
        "warps": 16,
        "budget": {"registers": 64, "shared": 1024, "loads": 8, "stores": 4},
    },
    {
        "kernel": _absorb,
        "variant": " entropy, cap, bias",
        "signature": f"*fp32:16, i32:16, *i64:16, i32:16, *bf16:16, {_CAPPED}, {_SUMS}, "
        "*bf16:16, i32:16, *bf16:16, i32:16, *fp32:16, i32:16, *fp32:16, i32:16, None, None, i32:16, i32:16, True, "
        "16384",
        "warps": 16,
        "budget": {"registers": 128, "shared": 1024, "loads": 12, "stores": 8},
    },
    {
        "kernel": _finish,
        "variant": " frozen",
        "signature": f"*bf16:16, i32:16, *i64:16, {_UNCAPPED}, {_SUMS}, *fp32:16, *fp32:16, *fp32:16, "
        "i32:16, *fp32:16, i32:16, None, 0, i32:16, False, 1024",
        "warps": 4,
        "amd": {"budget": {"registers": 40, "shared": 4096, "loads": 2, "stores": 2}},
        "budget": {"registers": 40, "shared": 4096, "loads": 3, "stores": 2},
    },
    {
        "kernel": _softmax_gradient,
        "variant": " entropy, cap",
        "signature": f"*fp32:16, i32:16, *i64:16, i32:16, None, {_CAPPED}, {_COEFFICIENTS}, "
        "*bf16:16, i32:16, i32:16, 16384",
        "warps": 16,
        "budget": {"registers": 128, "shared": 0, "loads": 8, "stores": 4},
    },
    {
        "kernel": _kept_gradient,
        "signature": "*bf16:16, i32:16, *i64:16, i32:16, *fp32:16, *fp32:16, *bf16:16, i32:16, i32:16, 16384",
        "warps": 16,
        "budget": {"registers": 48, "shared": 0, "loads": 4, "stores": 4},
    },
]
