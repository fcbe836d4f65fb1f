"""csrc/cuda/accumulate_fisher.cu, run on the CPU, against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import reference
from fastalign.ops.accumulate_fisher import accumulate_fisher_

CU_SEQLENS = torch.tensor([1, 1, 2, 7, 40, 40, 57])  # empty, of one token, longer than a chunk, not all tokens
TOKENS = 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("out", "width", "padding"), [(1, 1, 0), (136, 72, 0), (37, 67, 3)])
def test_error_budget(cuda, dtype, out, width, padding):
    """As on the CPU: a sum of n products is off by 8 sqrt(n) eps of the sum of their sizes, its square twice that."""
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(TOKENS, n + padding, generator=generator).to(dtype)[:, :n] for n in (out, width))
    start = torch.rand(out, width, generator=generator)
    fisher = torch.full((out, width + padding), torch.nan)[:, :width].copy_(start)
    assert accumulate_fisher_(fisher, g, x, CU_SEQLENS, backend="cuda") is fisher
    exact = reference.accumulate_fisher(start.double(), g.double(), x.double(), CU_SEQLENS)
    eps = torch.finfo(torch.float32).eps
    budget = eps * CU_SEQLENS.numel() * exact
    for a, b in zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True):
        off = 8 * math.sqrt(b - a) * eps * (g[a:b].double().abs().T @ x[a:b].double().abs())
        budget += 2 * off * (g[a:b].double().T @ x[a:b].double()).abs() + off**2
    assert ((fisher.double() - exact).abs() <= budget).all()


def test_one_launch(cuda, emulated):
    before = emulated.launches()
    accumulate_fisher_(torch.zeros(3, 4), torch.ones(60, 3), torch.ones(60, 4), CU_SEQLENS, backend="cuda")
    assert emulated.launches() - before == 1
