"""The sums of `linear_logprobs` without tiles, in Triton: products and online softmax in one launch, no logit stored.

For what needs no gradient from this pass. A program takes a block of rows and a chunk of the vocabulary; chunks are of
one size whatever the number of rows, and merged in their order, so a token's sums do not depend on the batch.
Inputs of 16 bits alone: float32 products belong to the vendor's library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

START = tl.constexpr(-1e30)
CHUNK = 1024  # 384 programs of 128 rows at 2048 x 49152: nearly three times the multiprocessors of a large GPU
# With 128 registers two programs fit a multiprocessor: one multiplies while the other takes exponentials.
WIDE = {"ROWS": 128, "ENTRIES": 128, "STEP": 32, "num_warps": 8, "num_stages": 4, "maxnreg": 128}
NARROW = {"ROWS": 64, "ENTRIES": 128, "STEP": 64, "num_warps": 8, "num_stages": 3}  # what those before 9.0 hold


@triton.jit
def _tanh(x):
    """Within a few ulp everywhere: the quotient cancels near 0, where the series has converged."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    quotient = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _logit(u, factor, inner, outer):
    """inner = logit_scale / softcap and outer = softcap / temperature, or None without a cap."""
    if outer is None:
        return u * factor
    else:
        return _tanh(u * inner) * outer


@triton.jit
def _scan(
    hidden_ptr, hidden_stride, weight_ptr, weight_stride, targets_ptr, bias_ptr, factor, inner, outer,
    out_ptr, rows, vocab, width,
    ENTROPY: tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out (chunks, 4, N): as in `Sums`, of each chunk alone; the shift is the maximum without the target."""
    blocks = tl.cdiv(rows, ROWS)
    top_row = tl.program_id(0) % blocks * ROWS
    chunk = tl.program_id(0) // blocks
    k = tl.arange(0, STEP)
    # Rows and entries beyond the end read the last one instead, so that no load needs a mask; they are left out below.
    # Only what is the same for a whole program takes 64 bits: registers are scarce.
    own = tl.minimum(tl.arange(0, ROWS), rows - 1 - top_row)
    hidden_at = hidden_ptr + top_row.to(tl.int64) * hidden_stride + (own[:, None] * hidden_stride + k[None, :])
    weight_ptr += chunk.to(tl.int64) * CHUNK * weight_stride
    left = vocab - chunk * CHUNK
    target = (tl.load(targets_ptr + top_row + own) - chunk * CHUNK).to(tl.int32)
    shift = tl.full((ROWS,), START, tl.float32)
    others = tl.zeros((ROWS,), tl.float32)
    zothers = tl.zeros((ROWS,), tl.float32)
    z_y = tl.zeros((ROWS,), tl.float32)
    for first in range(0, tl.minimum(CHUNK, left), ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        known = tl.minimum(entry, left - 1)
        weight_at = weight_ptr + (known[:, None] * weight_stride + k[None, :])
        u = tl.zeros((ROWS, ENTRIES), tl.float32)
        for start in range(0, width, STEP):
            if EVEN:
                h = tl.load(hidden_at + start)
                w = tl.load(weight_at + start)
            else:
                h = tl.load(hidden_at + start, mask=k[None, :] < width - start, other=0.0)
                w = tl.load(weight_at + start, mask=k[None, :] < width - start, other=0.0)
            u = tl.dot(h, w.T, u, input_precision="ieee")
        if bias_ptr is not None:
            u += tl.load(bias_ptr + chunk * CHUNK + known).to(tl.float32)[None, :]
        z = _logit(u, factor, inner, outer)
        here = entry[None, :] == target[:, None]
        z_y += tl.sum(tl.where(here, z, 0.0), 1)
        z = tl.where(here, float("-inf"), z)
        if first + ENTRIES > left:
            z = tl.where(entry[None, :] >= left, float("-inf"), z)
        top = tl.maximum(shift, tl.max(z, 1))
        moved = shift - top
        shrink = tl.exp(moved)
        d = z - top[:, None]
        e = tl.exp(d)
        if ENTROPY:
            zothers = shrink * (zothers + moved * others) + tl.sum(tl.maximum(d, START) * e, 1)
        others = shrink * others + tl.sum(e, 1)
        shift = top
    row = top_row + tl.arange(0, ROWS)
    out_ptr += chunk.to(tl.int64) * 4 * rows + row
    tl.store(out_ptr, shift, mask=row < rows)
    tl.store(out_ptr + rows, others, mask=row < rows)
    tl.store(out_ptr + 2 * rows, zothers, mask=row < rows)
    tl.store(out_ptr + 3 * rows, z_y, mask=row < rows)


@triton.jit
def _merge(parts_ptr, chunks, sums_ptr, rows, CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """parts (chunks, 4, N) into sums (4, N)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.arange(0, CHUNKS)
    inside = (chunk < chunks)[:, None] & (row < rows)[None, :]
    at = parts_ptr + (chunk.to(tl.int64) * 4 * rows)[:, None] + row[None, :]
    shifts = tl.load(at, mask=inside, other=START)
    others = tl.load(at + rows, mask=inside, other=0.0)
    zothers = tl.load(at + 2 * rows, mask=inside, other=0.0)
    z_y = tl.sum(tl.load(at + 3 * rows, mask=inside, other=0.0), 0)
    shift = tl.maximum(tl.max(shifts, 0), z_y)  # the chunks left the target out
    moved = shifts - shift[None, :]
    shrink = tl.exp(moved)
    tl.store(sums_ptr + row, shift, mask=row < rows)
    tl.store(sums_ptr + rows + row, tl.sum(shrink * others, 0), mask=row < rows)
    tl.store(sums_ptr + 2 * rows + row, tl.sum(shrink * (zothers + moved * others), 0), mask=row < rows)
    tl.store(sums_ptr + 3 * rows + row, z_y, mask=row < rows)


def _head(head) -> tuple[float, float | None, float | None]:
    if head.softcap is None:
        return head.factor, None, None
    return head.factor, head.logit_scale / head.softcap, head.softcap / head.temperature


def _tile(t: Tensor) -> dict[str, int]:
    wide = t.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(t.device) >= (9, 0)
    return WIDE if wide else NARROW


def scan(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head, *, entropy: bool) -> Tensor:
    """What `absorb` leaves in its sums after the whole vocabulary: hidden (N, H), weight (V, H), both of 16 bits,
    targets (N,), bias (V,) -> (4, N) float32: shift, others, zothers, target."""
    rows, (vocab, width) = targets.shape[0], weight.shape
    hidden, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, weight))
    if triton.knobs.runtime.interpret and hidden.dtype == torch.bfloat16:
        hidden, weight = hidden.float(), weight.float()  # the interpreter would multiply their bits as integers
    chunks, tile = triton.cdiv(vocab, CHUNK), _tile(hidden)
    parts, sums = (hidden.new_empty(*shape, rows, dtype=torch.float32) for shape in ((chunks, 4), (4,)))
    if rows:
        _scan[(triton.cdiv(rows, tile["ROWS"]) * chunks,)](
            hidden, hidden.stride(0), weight, weight.stride(0), targets, bias, *_head(head), parts, rows, vocab, width,
            ENTROPY=entropy, EVEN=width % tile["STEP"] == 0, CHUNK=CHUNK, **tile,
        )  # fmt: skip
        _merge[(triton.cdiv(rows, 16),)](
            parts, chunks, sums, rows, CHUNKS=max(2, triton.next_power_of_2(chunks)), ROWS=16
        )
    return sums


# What `make gpu-check` compiles, and what it may take.
def _check(tile: dict[str, int], **more) -> dict:
    sizes = ", ".join(str(tile[name]) for name in ("ROWS", "ENTRIES", "STEP"))
    return {
        "kernel": _scan,
        "variant": f" {tile['ROWS']} rows",
        "signature": "*bf16:16, i32:16, *bf16:16, i32:16, *i64:16, None, fp32, None, None, *fp32:16, i32:16, i32:16, "
        f"i32:16, False, True, {CHUNK}, {sizes}",
        "warps": tile["num_warps"],
        "options": {name: tile[name] for name in ("num_stages", "maxnreg") if name in tile},
        "budget": {"registers": 128, "shared": 110000, "loads": 4, "stores": 0, "tensor_cores": True},
    } | more


CHECKS = [
    _check(WIDE, targets=("sm_90", "sm_100")),
    _check(NARROW, amd={"options": {"num_stages": 2}}),
    {
        "kernel": _merge,
        "signature": "*fp32:16, i32, *fp32:16, i32:16, 64, 16",
        "warps": 4,
        "budget": {"registers": 80, "shared": 4096, "loads": 1, "stores": 0},
    },
]
