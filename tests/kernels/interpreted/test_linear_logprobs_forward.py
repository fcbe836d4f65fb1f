"""The vocabulary folded in one launch, against the epilogue's definition in float64, and through the op."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import linear_logprobs, reference
from fastalign.kernels import linear_logprobs_forward as kernels
from fastalign.ops import epilogue, native_triton, tiles
from fastalign.ops.epilogue import START, Head, Sums

EPS = torch.finfo(torch.float32).eps
N, H, V = 21, 40, 83
HEADS = {
    "plain": Head(),
    "scaled": Head(logit_scale=-0.6, temperature=1.7),
    "softcap": Head(logit_scale=0.8, softcap=3.0, temperature=0.7),
}


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Two blocks of rows, three chunks of two blocks of the vocabulary, two steps along the width; the last ragged."""
    monkeypatch.setattr(kernels, "CHUNK", 32)
    monkeypatch.setattr(kernels, "NARROW", {"ROWS": 16, "ENTRIES": 16, "STEP": 32, "num_warps": 4, "num_stages": 1})


def problem(dtype, *, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator) * spread
    weight = torch.randn(V, H, generator=generator) / H**0.5
    targets = torch.randint(V, (N,), generator=generator)
    targets[:3] = torch.tensor([0, V - 1, 32])
    return hidden.to(dtype), weight.to(dtype), targets, torch.randn(V, generator=generator).to(dtype)


def sums(hidden, weight, targets, bias, head, entropy):
    """By the definition, in float64."""
    u = hidden.double() @ weight.double().T
    start = Sums(torch.full((N,), START, dtype=torch.float64), *torch.zeros(3, N, dtype=torch.float64))
    epilogue.absorb(u, targets, 0, None if bias is None else bias.double(), head, start, entropy=entropy)
    return start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("head", HEADS)
def test_scan(head, with_bias, entropy, dtype):
    head, (hidden, weight, targets, bias) = HEADS[head], problem(dtype)
    bias = bias if with_bias else None
    shift, others, zothers, target = kernels.scan(hidden, weight, targets, bias, head, entropy=entropy).double()
    exact = sums(hidden, weight, targets, bias, head, entropy)
    logit = float(hidden.float().norm(dim=1).max() * weight.float().norm(dim=1).max()) + 3
    off = 4 * math.sqrt(H) * EPS * logit  # of a logit, and so relative in its exponential
    assert ((shift - exact.shift).abs() <= off).all() and ((target - exact.target).abs() <= off).all()
    shrink = (shift - exact.shift).exp()
    assert ((others * shrink - exact.others).abs() <= 2 * off * exact.others).all()
    if entropy:
        moved = exact.zothers + (exact.shift - shift) * exact.others
        assert ((zothers * shrink - moved).abs() <= 4 * off * (moved.abs() + exact.others)).all()


def test_masked_entries():
    hidden, weight, targets, bias = problem(torch.bfloat16)
    bias[5:] = -math.inf
    targets[:] = torch.arange(N) % 5
    targets[7] = 50
    got = kernels.scan(hidden, weight, targets, bias, Head(), entropy=True)
    exact = sums(hidden, weight, targets, bias, Head(), True)
    assert got[3][7] == -math.inf and got[:3].isfinite().all()
    torch.testing.assert_close(got.double(), torch.stack(exact), rtol=1e-4, atol=1e-4)


def test_a_tokens_sums_do_not_depend_on_the_batch():
    hidden, weight, targets, _ = problem(torch.bfloat16)
    together = kernels.scan(hidden, weight, targets, None, Head(), entropy=True)
    alone = kernels.scan(hidden[13:14], weight, targets[13:14], None, Head(), entropy=True)
    assert torch.equal(together[:, 13:14], alone)
    assert kernels.scan(hidden[:0], weight, targets[:0], None, Head(), entropy=True).shape == (4, 0)


def test_strided_inputs():
    hidden, weight, targets, _ = problem(torch.bfloat16)
    apart = torch.full((N, 2 * H), math.nan, dtype=hidden.dtype)[:, :H].copy_(hidden)
    plain = kernels.scan(hidden, weight, targets, None, Head(), entropy=False)
    for h, w in ((apart, weight), (hidden.T.contiguous().T, weight.T.contiguous().T)):
        assert torch.equal(kernels.scan(h, w, targets, None, Head(), entropy=False), plain)


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_the_op_takes_it_where_no_gradient_comes_from_the_pass(entropy, monkeypatch):
    calls = []
    scan = kernels.scan
    monkeypatch.setattr(kernels, "scan", lambda *args, **options: calls.append(1) or scan(*args, **options))
    hidden, weight, targets, bias = problem(torch.bfloat16)
    targets[4:7] = -100
    options = {"bias": bias, "softcap": 5.0, "entropy": entropy}

    def run(h, w, **more):
        out = linear_logprobs(h, w, targets, backend="triton", **options, **more)
        return out if entropy else (out,)

    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets, **options | {"bias": bias.double()})
    exact = exact if entropy else (exact,)
    for out in (run(hidden, weight), run(hidden, weight.clone().requires_grad_(), memory_budget=0)):
        for ours, truth in zip(out, exact, strict=True):
            assert (ours.double() - truth).abs().max() < 1e-4
    assert len(calls) == 2
    run(hidden.clone().requires_grad_(), weight)
    if not entropy:
        run(hidden, weight.clone().requires_grad_())  # keeps its tiles
    run(hidden.float(), weight.float())
    assert len(calls) == 2
    assert native_triton.epilogue().scan is not None and tiles.TORCH.scan is None
