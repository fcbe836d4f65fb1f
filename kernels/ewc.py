"""Elastic weight consolidation in Triton: many tensors in one launch, each element read once.

A table of addresses lies on the GPU, and each program takes one block of one tensor. Sums have two levels: each program
writes the sum of its block, and these are added up afterwards. So the order of additions depends on the shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _at(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from an address; the compiler uses 16-byte loads where it knows of the alignment."""
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(at, inside):
    """The values there, of all elements where `inside` is None."""
    return tl.load(at) if inside is None else tl.load(at, mask=inside, other=0.0)


@triton.jit
def _block_penalty(row, column, inside, strength, THETA: tl.constexpr, ANCHOR: tl.constexpr, FISHER: tl.constexpr,
                   GRAD: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """F (theta - theta0)^2 of some elements of a tensor; its gradient is written."""
    theta = _load(_at(tl.load(row), THETA, ALIGNED) + column, inside).to(tl.float32)
    anchor = _load(_at(tl.load(row + 1), ANCHOR, ALIGNED) + column, inside).to(tl.float32)
    distance = theta - anchor
    weighted = distance
    if FISHER:
        weighted *= _load(_at(tl.load(row + 2), tl.float32, ALIGNED) + column, inside)
    if GRAD:
        grad = _at(tl.load(row + 3), THETA, ALIGNED) + column
        added = strength * weighted
        if tl.load(row + 5) == 0:
            added += _load(grad, inside).to(tl.float32)
        tl.store(grad, added.to(THETA), mask=inside)
    return weighted * distance


@triton.jit
def _penalty(
    tensors_ptr, blocks_ptr, sums_ptr, strength,
    THETA: tl.constexpr, ANCHOR: tl.constexpr, FISHER: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block: sums[b] = sum F (theta - theta0)^2, and grad = or += strength F (theta - theta0).

    tensors: (n, 6) addresses of theta, theta0, F and the gradient, number of elements, and 1 where the gradient's old
    values do not count. blocks: (programs, 2) tensor, and block of it.
    """
    program = tl.program_id(0).to(tl.int64)
    row = tensors_ptr + 6 * tl.load(blocks_ptr + 2 * program)
    start = tl.load(blocks_ptr + 2 * program + 1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    size = tl.load(row + 4)
    if start + BLOCK <= size:  # whole blocks go without a mask, which would turn 16-byte loads into single values
        parts = _block_penalty(row, column, None, strength, THETA, ANCHOR, FISHER, GRAD, ALIGNED)
    else:
        parts = _block_penalty(row, column, column < size, strength, THETA, ANCHOR, FISHER, GRAD, ALIGNED)
    tl.store(sums_ptr + program, tl.sum(parts.to(tl.float64), 0))


def _tables(rows: list[list[int]], sizes: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The table of tensors, and the table (programs, 2) of tensor and block of it, on the device."""
    blocks = [(i, b) for i, size in enumerate(sizes) for b in range(triton.cdiv(size, BLOCK))]
    tables = torch.tensor(rows), torch.tensor(blocks, dtype=torch.int64).view(-1, 2)
    if device.type == "cuda":  # from pinned memory, so that nothing waits
        tensors, programs = (t.pin_memory().to(device, non_blocking=True) for t in tables)
        return tensors, programs
    return tables


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _aligned(*tensors: Tensor | None) -> bool:
    return all(_address(t) % 16 == 0 for t in tensors)


def ewc_penalty(
    parameters: list[Tensor],
    anchors: list[Tensor],
    fishers: list[Tensor] | None,
    strength: float,
    grads: list[Tensor] | None = None,
    fresh: list[bool] | None = None,
) -> Tensor:
    """`sum_i F_i (theta_i - theta0_i)^2` over all tensors, a float64 scalar, and its gradient.

    The gradient `strength F (theta - theta0)` overwrites the grads, or is added to them where `fresh` is False. All
    tensors are contiguous and on one device, and fishers are float32.
    """
    device, sums = parameters[0].device, []
    kinds = {(p.dtype, a.dtype) for p, a in zip(parameters, anchors, strict=True)}
    for theta, anchor in sorted(kinds, key=str):  # tensors of the same dtypes go together
        chosen = [i for i, p in enumerate(parameters) if (p.dtype, anchors[i].dtype) == (theta, anchor)]
        rows = [
            (parameters[i], anchors[i], fishers and fishers[i], grads and grads[i]) for i in chosen
        ]  # fmt: skip
        sizes = [parameters[i].numel() for i in chosen]
        table = [
            [*map(_address, row), size, bool(fresh and fresh[i])]
            for i, row, size in zip(chosen, rows, sizes, strict=True)
        ]
        tensors, blocks = _tables(table, sizes, device)
        partial = torch.zeros(len(blocks), dtype=torch.float64, device=device)
        sums.append(partial)
        if len(blocks):
            _penalty[(len(blocks),)](
                tensors, blocks, partial, strength, THETA=_TYPES[theta], ANCHOR=_TYPES[anchor],
                FISHER=fishers is not None, GRAD=grads is not None, ALIGNED=all(_aligned(*row) for row in rows),
                BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return torch.cat(sums).sum()


# What `make gpu-check` compiles, with the budgets (see linear_logprobs.py).
CHECKS = [
    {
        "kernel": _penalty,
        "signature": f"*i64:16, *i64:16, *fp64:16, fp32, tl.bfloat16, tl.bfloat16, True, True, True, {BLOCK}",
        "warps": WARPS,
        "budget": {"registers": 80, "shared": 128, "loads": 10, "stores": 2},
    },
]
