"""Matrix products that accumulate in float32, and in float64 for float64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def operand(t: Tensor) -> Tensor:
    """What enters a product: only CUDA multiplies low precision with a float32 result, elsewhere it is upcast."""
    low = t.dtype in (torch.bfloat16, torch.float16)
    return t.float() if low and t.device.type != "cuda" else t


def product_into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a @ b` into `out`, accumulated and kept in float32 (float64 for float64)."""
    if b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in a new tensor; `a` is cast to b's dtype."""
    dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
    return product_into(a.to(b.dtype), b, b.new_empty(a.shape[0], b.shape[1], dtype=dtype))


def accumulate(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """`acc += a @ b` in acc's dtype; `a` is cast to b's, in which the product is taken."""
    if b.dtype == acc.dtype:
        acc.addmm_(a.to(b.dtype), b)
    else:
        torch.addmm(acc, a.to(b.dtype), b, out_dtype=acc.dtype, out=acc)


def in_place(u: Tensor, dtype: torch.dtype) -> Tensor:
    """A tile of `dtype` in the memory of the tile u (R, T): each row begins where u's does."""
    return u if u.dtype == dtype else u.view(dtype)[:, : u.shape[1]]
