"""Matrix products whose sums and results are float32 (float64 for float64 inputs).

A logit of 40 that is rounded to bfloat16 is off by up to 0.125, and a sequence's log-probability adds up hundreds of
them. So the products of 16-bit inputs leave in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def operand(t: Tensor) -> Tensor:
    """`t` in the dtype in which it enters a product.

    Only CUDA multiplies 16-bit operands with a float32 result. Elsewhere they are converted to float32 first.
    """
    low = t.dtype in (torch.bfloat16, torch.float16)
    return t.float() if low and t.device.type != "cuda" else t


def product_into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a @ b` into `out`, accumulated in out's dtype: float32, or float64 for float64 operands."""
    if b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in a new tensor, where `a` is converted to b's dtype first."""
    dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
    return product_into(a.to(b.dtype), b, b.new_empty(a.shape[0], b.shape[1], dtype=dtype))


def accumulate(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """`acc += a @ b` in acc's dtype, where `a` is converted to b's dtype first."""
    if b.dtype == acc.dtype:
        acc.addmm_(a.to(b.dtype), b)
    else:
        torch.addmm(acc, a.to(b.dtype), b, out_dtype=acc.dtype, out=acc)


def in_place(u: Tensor, dtype: torch.dtype) -> Tensor:
    """A tile of `dtype` in the memory of the tile u (R, T): each of its rows begins where u's row begins."""
    return u if u.dtype == dtype else u.view(dtype)[:, : u.shape[1]]
