"""preference_loss in Triton: the tests of the other backends, with their budgets, and offsets that do not fit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from fastalign.kernels import preference_loss as kernels
from fastalign.ops.preference_loss import preference_loss


def shared_tests():
    path = Path(__file__).parents[2] / "ops" / "test_preference_loss.py"
    spec = importlib.util.spec_from_file_location("other_backends", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shared = shared_tests()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Sequences of several blocks, the last one ragged."""
    monkeypatch.setattr(kernels, "BLOCK", 8)


@pytest.mark.parametrize("size", [1.0, 3e3])
@pytest.mark.parametrize(("name", "options"), shared.CASES, ids=str)
def test_error_budget(name, options, size):
    shared.test_float32_error_budget("triton", name, options, size)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_order_lengths_and_averages(name, averaged):
    logprobs, ref_sums, extra = shared.problem(name, torch.float32)
    lengths = torch.arange(shared.SEQUENCES, dtype=torch.float32)
    options = extra | {"averaged": averaged, "lengths": lengths, "alternating": False}
    found = shared.evaluate(logprobs, ref_sums, name, backend="triton", **options)
    exact = shared.evaluate(logprobs, ref_sums, name, backend="reference", **options)
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("where", "value"), [(0, 1), (3, 50), (3, -4), (3, 0), (12, 40), (12, 42)])
def test_offsets_that_do_not_fit_touch_nothing_outside_and_give_nan(where, value):
    logprobs, ref_sums, _ = shared.problem("dpo", torch.float32)
    memory = torch.full((3, shared.S), 7.0)
    memory[1] = logprobs
    offsets = shared.CU_SEQLENS.clone()
    offsets[where] = value
    out = preference_loss(memory[1].requires_grad_(), offsets, ref_sums, backend="triton")
    wrong = torch.zeros(shared.SEQUENCES, dtype=torch.bool)
    lower, upper = offsets[:-1], offsets[1:]
    wrong |= (lower < 0) | (lower > upper) | (upper > shared.S)
    wrong[0] |= bool(lower[0] != 0)
    wrong[-1] |= bool(upper[-1] != shared.S)
    assert wrong.any() and torch.equal(out.sums.isnan(), wrong)
    assert torch.equal(out.losses.isnan(), wrong.view(-1, 2).any(1))
    out.losses.sum().backward()


def test_extreme_margins_are_finite():
    for name in ("dpo", "simpo", "orpo", "hinge"):
        for size in (1e-6, 1e4):
            logprobs, ref_sums, extra = shared.problem(name, torch.float32, size)
            out = shared.evaluate(logprobs, ref_sums, name, backend="triton", **extra)
            assert all(t.isfinite().all() for t in out), name


@triton.jit
def _apply(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, kernels._expm1(x), mask=at < n)
    tl.store(out_ptr + n + at, kernels._log1p(tl.exp(x)), mask=at < n)


def test_expm1_and_log1p_keep_their_digits():
    x = torch.cat([-torch.logspace(-300, 2, 200, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    out = torch.empty(2, len(x), dtype=torch.float64)
    _apply[(1,)](x, out, len(x), 256)
    torch.testing.assert_close(out[0], x.expm1(), rtol=1e-15, atol=0.0)
    torch.testing.assert_close(out[1], x.exp().log1p(), rtol=1e-15, atol=0.0)
