"""Products of every dtype: accumulated and kept in float32, or float64."""

from __future__ import annotations

import pytest
import torch

from fastalign.ops.head.products import accumulate, in_place, operand, product, product_into

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def operands(dtype):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 300), (300, 7)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_round_like_the_accumulator_not_like_the_inputs(dtype):
    a, b = operands(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()
    low = operand(b)
    assert low.dtype == wide, "the CPU multiplies 16 bits without a float32 result"
    acc = torch.ones(5, 7, dtype=wide)
    accumulate(acc, a, low)
    for found in (product(a, low), product_into(a.to(wide), low, torch.empty(5, 7, dtype=wide)), acc - 1):
        assert found.dtype == wide
        assert ((found - exact).abs() <= 300 * torch.finfo(wide).eps * (size + 1)).all()


def test_a_tile_of_another_dtype_lies_in_the_same_memory():
    u = torch.randn(4, 6)
    low = in_place(u, torch.bfloat16)
    assert low.shape == u.shape and low.dtype == torch.bfloat16
    assert [row.data_ptr() for row in low] == [row.data_ptr() for row in u]
    assert in_place(u, torch.float32) is u
