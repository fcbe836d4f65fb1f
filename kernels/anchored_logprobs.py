"""Anchored log-probabilities: one product over the vocabulary whose epilogue leaves exponentials (Hopper and later).

`ops/head/anchored.py` explains the mathematics, and `ops/backends/anchored.py` launches these kernels. In short, per
row with the target's logit z_y, in units of log2 (z2 = z log2 e):

    anchor     k   = round(z2_y) + 40                      known before the scan, from the target's row of W alone
    scan       e_j = 2^(z2_j - k), 0 at the target         one product; e in bfloat16, its sums per tile in float32
    rescue     rows whose sum overflowed, with their maximum as the anchor
    finish     logprob = -log(1 + sum_j e_j 2^(k - z2_y))

The anchor of a row depends on that row alone. So tiles need no running maximum, no order and no rescaling, and a row
has the same bits in any batch. Forward with and without gradients run one binary (`keep` is an argument, no constant),
so they have the same bits too.

Letters: R rows (tokens), V vocabulary entries, H the width of hidden states, tiles the number of vocabulary tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor

# Where the kernels of this process run: Triton decides it when a kernel is decorated.
DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
# The interpreter multiplies the bits of bfloat16 operands as if they were integers: it gets float32 ones.
_WIDE = tl.constexpr(triton.knobs.runtime.interpret)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# bfloat16 keeps its relative precision from 2^-126 to 2^127. With the anchor 40 above the target, entries count from 60
# nats below the target (e^-60 of its probability) to 83 nats above it, where `rescue` takes over.
_ABOVE = tl.constexpr(40.0)
_OVERFLOW = tl.constexpr(2.0**80)
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _tanh(x):
    """Tanh, within a few ulp: near 0 by its Taylor series, because 1 - e would lose its digits there."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2 * _LOG2E))
    quotient = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _logit2(u, factor2, inner, outer2):
    """The logit of a product in units of log2. factor2 = log2 e dz/du; with a cap, z2 = tanh(inner u) outer2."""
    return u * factor2 if outer2 is None else _tanh(u * inner) * outer2


@triton.jit
def _bend(z2, outer2):
    """1 - tanh^2, what a soft cap multiplies the slope dz/du with, from the logit; 1 without a cap."""
    t = tl.maximum(z2 / outer2, -1.0)  # an entry that is ruled out counts as the cap's lower end
    return 1 - t * t


@triton.jit
def anchor(
    h_ptr, h_stride, w_ptr, w_stride, targets_ptr, bias_ptr, factor2, inner, outer2, own_ptr, anchor_ptr, base_ptr,
    width, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the target's logit z2_y, the anchor k, and what the entropy's logits are taken relative to."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h = tl.load(h_ptr + row * h_stride + at, mask=at < width, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + target * w_stride + at, mask=at < width, other=0.0).to(tl.float32)
        total += h * w
    u = tl.sum(total, 0)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + target).to(tl.float32)
    z2 = _logit2(u, factor2, inner, outer2)
    tl.store(own_ptr + row, z2)
    tl.store(base_ptr + row, z2)
    tl.store(anchor_ptr + row, tl.floor(z2 + 0.5) + _ABOVE)


@triton.jit
def _tile(
    u, n0, m0, anchor, base, target, e_desc, bias_ptr, factor2, inner, outer2, vocab, keep, total, ztotal,
    slope_1, slope_2, at_target, GRADIENT: tl.constexpr, ENTROPY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A part of a tile, after its product: exponentials and their sums, or with GRADIENT the gradient in u."""
    column = n0 + tl.arange(0, WIDTH)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + column, mask=column < vocab, other=0.0).to(tl.float32)[None, :]
    z2 = _logit2(u, factor2, inner, outer2)
    e = tl.exp2(z2 - anchor[:, None])
    if GRADIENT:  # the anchor is the logarithm of the sum, so e is the probability
        if slope_2 is not None:
            d = tl.maximum(z2 - anchor[:, None], _LOWEST)
            e *= slope_1[:, None] + slope_2[:, None] * d
        else:
            e *= slope_1[:, None]
        if outer2 is not None:
            e *= _bend(z2, outer2)
    inside = (target >= n0) & (target < n0 + WIDTH)
    # Most tiles hold no target: a branch that all threads take alike spares them the comparisons.
    if (tl.max(inside.to(tl.int32), 0) > 0) | (n0 + WIDTH > vocab):
        value = at_target[:, None] if GRADIENT else 0.0
        e = tl.where(column[None, :] == target[:, None], value, e)
        e = tl.where(column[None, :] >= vocab, 0.0, e)
    if GRADIENT:
        e_desc.store([m0, n0], e.to(e_desc.dtype))
    else:
        total += tl.sum(e, 1)
        if ENTROPY:
            ztotal += tl.sum(e * tl.maximum(z2 - base[:, None], _LOWEST), 1)
        if keep != 0:
            if outer2 is not None:
                e *= _bend(z2, outer2)
            e_desc.store([m0, n0], e.to(e_desc.dtype))
    return total, ztotal


# Triton compiles a kernel anew for arguments that are 1 or multiples of 16. Exponentials that are kept (1) or not (0),
# and batches of another size, must run the same binary: else they could have other bits.
@triton.jit(do_not_specialize=["first", "rows", "vocab", "keep", "programs"])
def scan(  # noqa: C901 - its branches are decided when it is compiled
    h_desc, w_desc, e_desc, anchor_ptr, base_ptr, targets_ptr, first, bias_ptr, factor2, inner, outer2, partial_ptr,
    zpartial_ptr, slope_1_ptr, slope_2_ptr, at_target_ptr, rows, vocab, width, keep, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr, PARTS: tl.constexpr,
    GRADIENT: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """All tiles of h (R, H) W' (V, H): e (R, V) where `keep`, and its sums (tiles, R); or the gradient in u (R, V).

    The programs stay, and take one tile after the other. Rows run fastest, so that a tile of W is read from memory
    once. The epilogue runs in PARTS, because the exponentials of a whole tile do not fit into registers.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(vocab, BLOCK_N)
    steps = tl.cdiv(width, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=FLATTEN):
        m, n = tile % tiles_m, tile // tiles_m
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(steps):
            a = h_desc.load([m * BLOCK_M, k * BLOCK_K])
            b = w_desc.load([n * BLOCK_N, k * BLOCK_K])
            if _WIDE:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b.T, acc)
        row = m * BLOCK_M + tl.arange(0, BLOCK_M)
        real = row < rows
        anchor = tl.load(anchor_ptr + row, mask=real, other=0.0)
        target = (tl.load(targets_ptr + row, mask=real, other=-1) - first).to(tl.int32)
        base, slope_1, slope_2, at_target = anchor, anchor, None, anchor
        if ENTROPY:
            base = tl.load(base_ptr + row, mask=real, other=0.0)
        if GRADIENT:
            slope_1 = tl.load(slope_1_ptr + row, mask=real, other=0.0)
            at_target = tl.load(at_target_ptr + row, mask=real, other=0.0)
            if slope_2_ptr is not None:
                slope_2 = tl.load(slope_2_ptr + row, mask=real, other=0.0)
        total, ztotal = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        if PARTS == 1:
            total, ztotal = _tile(
                acc, n * BLOCK_N, m * BLOCK_M, anchor, base, target, e_desc, bias_ptr, factor2, inner, outer2, vocab,
                keep, total, ztotal, slope_1, slope_2, at_target, GRADIENT, ENTROPY, BLOCK_N,
            )  # fmt: skip
        else:
            halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            for half in tl.static_range(2):
                total, ztotal = _tile(
                    halves[half], n * BLOCK_N + half * (BLOCK_N // 2), m * BLOCK_M, anchor, base, target, e_desc,
                    bias_ptr, factor2, inner, outer2, vocab, keep, total, ztotal, slope_1, slope_2, at_target,
                    GRADIENT, ENTROPY, BLOCK_N // 2,
                )  # fmt: skip
        if not GRADIENT:
            place = n * rows + row
            tl.store(partial_ptr + place, total, mask=real)
            if ENTROPY:
                tl.store(zpartial_ptr + place, ztotal, mask=real)


@triton.jit
def _sum_of_tiles(partial_ptr, tiles, rows, row, TILES: tl.constexpr):
    """A row's sums over the vocabulary tiles, added in a fixed order."""
    at = tl.arange(0, TILES)
    return tl.sum(tl.load(partial_ptr + at.to(tl.int64) * rows + row, mask=at < tiles, other=0.0), 0)


@triton.jit(do_not_specialize=["tiles", "rows", "keep", "vocab"])
def rescue(  # noqa: C901 - most of its branches are decided when it is compiled
    h_ptr, h_stride, w_ptr, w_stride, targets_ptr, bias_ptr, factor2, inner, outer2, partial_ptr, zpartial_ptr, tiles,
    rows, anchor_ptr, base_ptr, e_ptr, e_stride, keep, vocab, width,
    TILES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One row whose sum overflowed or is NaN: its maximum, then its exponentials. All other rows leave at once.

    The device decides, so the host need not wait, and a captured graph can hold it.
    """
    row = tl.program_id(0).to(tl.int64)
    others = _sum_of_tiles(partial_ptr, tiles, rows, row, TILES)
    if (others > _OVERFLOW) | (others != others):
        target = tl.load(targets_ptr + row)
        top = tl.full((), float("-inf"), tl.float32)
        k = top
        for again in range(2):
            for n in range(tiles):
                total, ztotal = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
                for start in range(0, TILE, BLOCK):
                    column = n * TILE + start + tl.arange(0, BLOCK)
                    u = tl.zeros((BLOCK,), tl.float32)
                    for first in range(0, width, CHUNK):
                        x = first + tl.arange(0, CHUNK)
                        h = tl.load(h_ptr + row * h_stride + x, mask=x < width, other=0.0).to(tl.float32)
                        w = tl.load(
                            w_ptr + column.to(tl.int64)[:, None] * w_stride + x[None, :],
                            mask=(column < vocab)[:, None] & (x < width)[None, :],
                            other=0.0,
                        ).to(tl.float32)
                        u += tl.sum(w * h[None, :], 1)
                    if bias_ptr is not None:
                        u += tl.load(bias_ptr + column, mask=column < vocab, other=0.0).to(tl.float32)
                    z2 = _logit2(u, factor2, inner, outer2)
                    z2 = tl.where((column < vocab) & (column != target), z2, float("-inf"))
                    if again == 0:
                        top = tl.maximum(top, tl.max(z2, 0))
                    else:
                        e = tl.exp2(z2 - k)
                        total += tl.sum(e, 0)
                        if ENTROPY:
                            ztotal += tl.sum(e * tl.maximum(z2 - k, _LOWEST), 0)
                        if keep != 0:
                            if outer2 is not None:
                                e *= _bend(z2, outer2)
                            out = e_ptr + row * e_stride + column
                            tl.store(out, e.to(e_ptr.dtype.element_ty), mask=column < vocab)
                if again == 1:
                    tl.store(partial_ptr + n * rows + row, total)
                    if ENTROPY:
                        tl.store(zpartial_ptr + n * rows + row, ztotal)
            k = tl.floor(top + 0.5)
        tl.store(anchor_ptr + row, k)
        tl.store(base_ptr + row, k)


@triton.jit(do_not_specialize=["tiles", "rows"])
def finish(
    partial_ptr, zpartial_ptr, tiles, rows, own_ptr, anchor_ptr, base_ptr, targets_ptr, w_ptr, w_stride, factor, outer2,
    a_ptr, a_stride, width, e_ptr, e_stride, logprobs_ptr, entropy_ptr, stats_ptr,
    TILES: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One row: log-prob, entropy and stats (R, 5); a = e W becomes d logprob / d h; e gets the target's own entry."""
    row = tl.program_id(0).to(tl.int64)
    others = _sum_of_tiles(partial_ptr, tiles, rows, row, TILES)
    own, k = tl.load(own_ptr + row), tl.load(anchor_ptr + row)
    at_target = tl.exp2(own - k)
    total = others + at_target
    ratio = others / at_target
    # log(1 + x) keeps its digits near x = 0. Far below the maximum x would overflow.
    rounded = 1 + ratio
    lost = rounded == 1
    near = -tl.where(lost, ratio, tl.log(rounded) * (ratio / tl.where(lost, 1, rounded - 1)))
    far = (own - k) * _LN2 - tl.log(total)
    logprob = tl.where(ratio < _OVERFLOW, near, far)
    tl.store(logprobs_ptr + row, logprob)
    entropy = total * 0
    if ENTROPY:
        # sum_j p_j log p_j, with logarithms relative to `base`: the target's logit, or a rescued row's maximum.
        base = tl.load(base_ptr + row)
        at = tl.where(at_target > 0, at_target * tl.maximum(own - base, _LOWEST), 0.0)
        mean = (_sum_of_tiles(zpartial_ptr, tiles, rows, row, TILES) + at) / total * _LN2
        entropy = tl.where(base == own, -logprob, tl.log(total) + (k - base) * _LN2) - mean
        tl.store(entropy_ptr + row, entropy)
    bend = total * 0 + 1
    if outer2 is not None:
        bend = _bend(own, outer2)
    tl.store(stats_ptr + 5 * row + 0, k + tl.log2(total))
    tl.store(stats_ptr + 5 * row + 1, total)
    tl.store(stats_ptr + 5 * row + 2, others / total)
    tl.store(stats_ptr + 5 * row + 3, factor * bend)
    tl.store(stats_ptr + 5 * row + 4, entropy)
    target = tl.load(targets_ptr + row)
    if e_ptr is not None:
        tl.store(e_ptr + row * e_stride + target, (-others * bend).to(e_ptr.dtype.element_ty))
    if a_ptr is not None:
        for start in range(0, width, BLOCK):
            x = start + tl.arange(0, BLOCK)
            w = tl.load(w_ptr + target * w_stride + x, mask=x < width, other=0.0).to(tl.float32)
            a = tl.load(a_ptr + row * a_stride + x, mask=x < width, other=0.0)
            tl.store(a_ptr + row * a_stride + x, factor * (others * bend * w - a) / total, mask=x < width)


class Tiles(NamedTuple):
    """How `scan` cuts up its product, and how it is compiled."""

    m: int  # rows of a tile
    n: int  # vocabulary entries of a tile
    k: int  # widths of hidden states that are multiplied at a time
    warps: int
    stages: int  # tiles of operands that are on their way at the same time
    flatten: bool  # whether the next tile's loads begin while this tile's epilogue runs
    parts: int  # of a tile, in the epilogue


# The widest tile feeds Hopper's tensor cores best, but its epilogue leaves no registers for tanh, and on Blackwell it
# spills. The interpreter gets small tiles, and so several of them.
_HOPPER, _SMALL, _INTERPRETED = (
    Tiles(128, 256, 64, 8, 4, True, 2), Tiles(128, 128, 64, 8, 4, False, 1), Tiles(16, 32, 16, 4, 1, False, 2)
)  # fmt: skip


def tiles_for(capability: tuple[int, int], *, capped: bool) -> Tiles:
    """The tiles for a GPU of this compute capability."""
    if DEVICE == "cpu":
        return _INTERPRETED
    return _HOPPER if capability[0] == 9 and not capped else _SMALL


# What `make gpu-check` compiles. `hgmma` is the shape of Hopper's tensor-core instruction, `copies` the fewest bulk
# tensor copies in each direction.
_CUDA, _HEAD = ("sm_90", "sm_100"), "fp32, None, None"
_CAPPED, _ROW, _ENDS = "fp32, fp32, fp32", "*fp32:16", "*bf16:16, i32:16, *bf16:16, i32:16, *i64:16"


def _scan_check(
    variant: str, tiles: Tiles, targets: tuple[str, ...], registers: int, shared: int, *, head: str = _HEAD,
    bias: str = "None", gradient: bool = False, entropy: bool = False,
) -> dict:  # fmt: skip
    """One entry of CHECKS: `scan` as it is launched."""
    rows = "*fp32:16"
    sums = (
        f"None, None, {rows}, {rows if variant.endswith('entropy') else 'None'}, {rows}"
        if gradient
        else (f"{rows}, {rows if entropy else 'None'}, None, None, None")
    )
    return {
        "kernel": scan,
        "variant": f" {variant}",
        "signature": f"tensordesc<bf16[{tiles.m}, {tiles.k}]>, tensordesc<bf16[{tiles.n}, {tiles.k}]>, "
        f"tensordesc<bf16[{tiles.m}, {tiles.n // tiles.parts}]>, {rows}, {rows if entropy else 'None'}, *i64:16, i32, "
        f"{bias}, {head}, {sums}, i32, i32, i32:16, i32, i32, {tiles.m}, {tiles.n}, {tiles.k}, {tiles.flatten}, "
        f"{tiles.parts}, {gradient}, {entropy}",
        "warps": tiles.warps,
        "options": {"num_stages": tiles.stages},
        "targets": targets,
        "budget": {
            "registers": registers, "shared": shared, "loads": 2 * tiles.stages, "stores": tiles.parts,
            "tensor_cores": True,
            "hgmma": f"64x{tiles.n}x16" if targets == ("sm_90",) else "",
        },
    }  # fmt: skip


CHECKS = [
    _scan_check("Hopper", _HOPPER, ("sm_90",), 232, 232448),
    _scan_check("Hopper, bias", _HOPPER, ("sm_90",), 240, 232448, bias="*bf16:16"),
    _scan_check("Hopper, entropy", _HOPPER, ("sm_90",), 255, 232448, entropy=True),
    _scan_check("Hopper, gradient", _HOPPER, ("sm_90",), 255, 232448, gradient=True),
    _scan_check("Hopper, gradient with entropy", _HOPPER, ("sm_90",), 255, 232448, gradient=True),
    _scan_check("small", _SMALL, _CUDA, 200, 232448),
    _scan_check("small, cap, bias, entropy", _SMALL, _CUDA, 255, 232448, head=_CAPPED, bias="*bf16:16", entropy=True),
    _scan_check("small, cap, gradient with entropy", _SMALL, _CUDA, 255, 232448, head=_CAPPED, gradient=True),
    *(
        {
            "kernel": kernel,
            "variant": variant,
            "signature": signature,
            "warps": 4,
            "targets": _CUDA,
            "budget": {"registers": registers, "shared": 4096, "loads": loads, "stores": stores},
        }
        for kernel, variant, signature, registers, loads, stores in (
            (anchor, "", f"{_ENDS}, None, {_HEAD}, {_ROW}, {_ROW}, {_ROW}, i32:16, 1024", 48, 2, 0),
            (
                rescue, "", f"{_ENDS}, None, {_HEAD}, {_ROW}, None, i32, i32, {_ROW}, {_ROW}, *bf16:16, i32, i32, i32, "
                "i32:16, 256, 256, 32, 64, False", 128, 1, 0,
            ),
            (
                rescue, " cap, entropy", f"{_ENDS}, *bf16:16, {_CAPPED}, {_ROW}, {_ROW}, i32, i32, {_ROW}, {_ROW}, "
                "*bf16:16, i32, i32, i32, i32:16, 1024, 128, 32, 64, True", 128, 1, 0,
            ),
            (
                finish, " frozen", f"{_ROW}, None, i32, i32, {_ROW}, {_ROW}, {_ROW}, *i64:16, *bf16:16, i32:16, fp32, "
                f"None, {_ROW}, i32:16, i32:16, None, 0, {_ROW}, {_ROW}, {_ROW}, 256, 1024, False", 64, 3, 2,
            ),
            (
                finish, " kept, cap, entropy", f"{_ROW}, {_ROW}, i32, i32, {_ROW}, {_ROW}, {_ROW}, *i64:16, *bf16:16, "
                f"i32:16, fp32, fp32, None, 0, i32:16, *bf16:16, i32, {_ROW}, {_ROW}, {_ROW}, 256, 1024, True", 64, 0,
                0,
            ),
        )
    ),
]  # fmt: skip
