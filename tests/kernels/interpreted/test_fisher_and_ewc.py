"""Fisher information and its penalty in Triton, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

from fastalign import reference
from fastalign.kernels import accumulate_fisher as fisher_kernels
from fastalign.kernels import ewc as kernels
from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.ewc import ewc_penalty, ewc_penalty_

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of F and of tokens, several blocks of a tensor, the last ones ragged."""
    monkeypatch.setattr(fisher_kernels, "TILE", {"ROWS": 16, "COLUMNS": 16, "TOKENS": 16})
    monkeypatch.setattr(kernels, "BLOCK", 32)


def operands(out, width, tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(tokens, n, generator=generator, dtype=torch.float64).to(dtype) for n in (out, width))
    return torch.rand(out, width, generator=generator), g, x


@pytest.mark.parametrize("shape", [(1, 1), (37, 23), (16, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accumulate_fisher(dtype, shape):
    cu_seqlens = torch.tensor([3, 3, 4, 9, 42, 42, 50])  # from the fourth token on, not to the last; empty ones too
    start, g, x = operands(*shape, 53, dtype)
    g[:3], g[50:] = 1e9, 1e9  # takes no part
    memory = torch.full((shape[0], shape[1] + 2), 1e9)
    memory[:, :-2] = start
    fisher_kernels.accumulate_fisher(memory[:, :-2], g, x, cu_seqlens)
    exact = reference.accumulate_fisher(start.double(), g.double(), x.double(), cu_seqlens)
    assert ((memory[:, :-2] - exact).abs() <= 64 * EPS * exact.abs().max()).all()
    assert (memory[:, -2:] == 1e9).all()


def test_offsets_outside_of_the_tokens_read_nothing_outside():
    start, g, x = operands(5, 4, 20, torch.float32)
    fisher = start.clone()
    fisher_kernels.accumulate_fisher(fisher, g, x, torch.tensor([-(2**40), 6, 2**40]))
    exact = reference.accumulate_fisher(start.double(), g.double(), x.double(), torch.tensor([0, 6, 20]))
    torch.testing.assert_close(fisher.double(), exact, rtol=1e-5, atol=1e-5)


def test_strided_operands():
    start, g, x = operands(18, 7, 20, torch.float32)
    cu_seqlens = torch.tensor([0, 12, 20])
    expected, fisher = start.clone(), start.clone()
    fisher_kernels.accumulate_fisher(expected, g, x, cu_seqlens)
    fisher_kernels.accumulate_fisher(fisher, g.t().contiguous().t(), torch.cat([x, x], 1)[:, :7], cu_seqlens)
    assert torch.equal(fisher, expected)


SIZES = [(3, 7), (64,), (), (0, 5), (5, 20)]


def parameters(dtype, anchor_dtype):
    generator = torch.Generator().manual_seed(0)
    draw = [[torch.randn(size, generator=generator) for size in SIZES] for _ in range(4)]
    theta, grads = ([t.to(dtype) for t in draw[i]] for i in (0, 3))
    return theta, [t.to(anchor_dtype) for t in draw[1]], [t.abs() for t in draw[2]], grads


@pytest.mark.parametrize("with_fisher", [True, False])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "added"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)  # fmt: skip
def test_ewc_penalty_and_its_gradient(dtypes, fresh, with_fisher):
    theta, anchors, fishers, grads = parameters(*dtypes)
    fishers = fishers if with_fisher else None
    before = [g.clone() for g in grads]
    if fresh:
        [g.fill_(float("nan")) for g in grads]
    total = kernels.ewc_penalty(theta, anchors, fishers, 0.7, grads, [fresh] * len(theta))
    exact = 0.0
    for i, (t, a) in enumerate(zip(theta, anchors, strict=True)):
        distance = t.double() - a.double()
        weighted = distance if fishers is None else distance * fishers[i].double()
        exact += (weighted * distance).sum()
        want = 0.7 * weighted + (0 if fresh else before[i].double())
        eps = torch.finfo(t.dtype).eps
        assert ((grads[i].double() - want).abs() <= eps * (want.abs() + 4)).all()
    assert total.dtype == torch.float64 and (total - exact).abs() <= 8 * EPS * exact
    assert torch.equal(kernels.ewc_penalty(theta, anchors, fishers, 0.7), total)


def test_mixed_dtypes_go_together():
    theta, anchors, fishers, _ = parameters(torch.float32, torch.float32)
    theta[1], anchors[1] = theta[1].bfloat16(), anchors[1].bfloat16()
    total = kernels.ewc_penalty(theta, anchors, fishers, 1.0)
    exact = sum(
        (f.double() * (t.double() - a.double()).square()).sum() for t, a, f in zip(theta, anchors, fishers, strict=True)
    )
    assert (total - exact).abs() <= 8 * EPS * exact


def test_ops():
    start, g, x = operands(5, 4, 20, torch.float32)
    cu_seqlens = torch.tensor([0, 6, 20])
    fisher = accumulate_fisher_(start.clone(), g, x, cu_seqlens, backend="triton")
    torch.testing.assert_close(fisher, accumulate_fisher_(start.clone(), g, x, cu_seqlens, backend="reference"))
    found = []
    for backend in ("triton", "torch"):
        theta, anchors, fishers, _ = parameters(torch.float32, torch.float32)
        theta = [t.requires_grad_() for t in theta]
        out = ewc_penalty(theta, anchors, fishers, 0.3, backend=backend)
        out.backward()
        again = ewc_penalty_(theta, anchors, fishers, 0.3, backend=backend)
        found.append([out.detach(), again, *(t.grad for t in theta)])
    torch.testing.assert_close(*found)
