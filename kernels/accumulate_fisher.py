"""`accumulate_fisher_` in Triton: `F += sum_s (G_s' X_s)^2`, where the square is the epilogue of the product.

There is one program per tile of F. The tile stays in registers over all sequences, beside the product of the current
sequence, and F is read and written once. bfloat16 and float16 are multiplied as they are, float32 in three TF32
products (on AMD in float32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"ROWS": 128, "COLUMNS": 64, "TOKENS": 32}
WARPS = 8


@triton.jit
def _fisher(
    fisher_ptr, fisher_stride, g_ptr, g_stride, x_ptr, x_stride, offsets_ptr, sequences, tokens, out, width,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One tile (ROWS, COLUMNS) of F."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of F's rows
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, TOKENS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in range(sequences):
        # Wrong offsets must not read outside of the tensors, even where an assertion of the device reports them later.
        begin = tl.maximum(tl.load(offsets_ptr + s), 0)
        end = tl.minimum(tl.load(offsets_ptr + s + 1), tokens)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)  # G_s' X_s
        for start in range(begin, end, TOKENS):
            t = (start + step).to(tl.int64)[:, None]
            g = tl.load(g_ptr + t * g_stride + i[None, :], mask=(t < end) & (i[None, :] < out), other=0.0)
            x = tl.load(x_ptr + t * x_stride + j[None, :], mask=(t < end) & (j[None, :] < width), other=0.0)
            product = tl.dot(tl.trans(g), x, product, input_precision=PRECISION)
        total += product * product  # squared per sequence: F is a sum of squares, not the square of a sum
    at = fisher_ptr + i.to(tl.int64)[:, None] * fisher_stride + j[None, :]
    inside = (i[:, None] < out) & (j[None, :] < width)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


def accumulate_fisher(fisher: Tensor, grad_output: Tensor, inputs: Tensor, cu_seqlens: Tensor) -> None:
    """In place on fisher (out, in) float32; grad_output (T, out), inputs (T, in) of one dtype, cu_seqlens (S + 1,)."""
    g, x = (t if t.stride(1) == 1 else t.contiguous() for t in (grad_output, inputs))
    if triton.knobs.runtime.interpret and g.dtype == torch.bfloat16:
        g, x = g.float(), x.float()  # the interpreter would multiply their bits as integers
    (out, width), sequences = fisher.shape, cu_seqlens.shape[0] - 1
    if out and width and sequences:
        split = g.dtype == torch.float32 and not torch.version.hip
        _fisher[(triton.cdiv(out, TILE["ROWS"]), triton.cdiv(width, TILE["COLUMNS"]))](
            fisher, fisher.stride(0), g, g.stride(0), x, x.stride(0), cu_seqlens.contiguous(), sequences, g.shape[0],
            out, width, PRECISION="tf32x3" if split else "ieee", **TILE, num_warps=WARPS,
        )  # fmt: skip


# What `make gpu-check` compiles, with the budgets (see linear_logprobs.py). Two tiles of F lie in registers,
# and three chunks of both operands in shared memory.
_SIGNATURE = "*fp32:16, i32:16, *{0}:16, i32:16, *{0}:16, i32:16, *i64:16, i32, i32, i32:16, i32:16, '{1}', 128, 64, 32"
CHECKS = [
    {
        "kernel": _fisher,
        "variant": f" {dtype}",
        "signature": _SIGNATURE.format(dtype, precision),
        "amd": {"signature": _SIGNATURE.format(dtype, "ieee")},
        "warps": WARPS,
        "budget": {"registers": registers, "shared": shared, "loads": 3, "stores": 4, "tensor_cores": True},
    }
    for dtype, precision, registers, shared in (("bf16", "ieee", 200, 48 << 10), ("fp32", "tf32x3", 224, 96 << 10))
]
