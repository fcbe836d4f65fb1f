"""selective_logprobs in Triton against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import reference, selective_logprobs
from fastalign.kernels import selective_logprobs as kernels

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks a row, the last one ragged."""
    monkeypatch.setattr(kernels, "BLOCK", 16)


def problem(dtype=torch.float32, *, rows=7, vocab=53, spread=4.0):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * spread).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[1], targets[2], targets[3] = -100, 0, vocab - 1
    return logits, targets, torch.randn(rows, generator=generator)


def exact(logits, targets, grad, temperature):
    leaf = logits.double().requires_grad_()
    out = reference.selective_logprobs(leaf, targets, temperature=temperature)
    return out.detach(), torch.autograd.grad((out * grad).sum(), leaf)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 16, 53])
def test_forward_and_backward(vocab, dtype, temperature):
    logits, targets, grad = problem(dtype, vocab=vocab)
    logprobs, stats = kernels.selective_logprobs(logits, targets, temperature, -100)
    d_logits = kernels.selective_logprobs_backward(grad, logits, targets, stats, temperature, -100)
    want, want_d = exact(logits, targets, grad, temperature)
    largest = logits.double().abs().max() / temperature  # z, log sum and their difference are each rounded at its size
    assert (logprobs - want).abs().max() <= 8 * EPS * (1 + largest)
    assert d_logits.dtype == dtype
    off = 16 * EPS * (1 + largest) + torch.finfo(dtype).eps
    assert (d_logits - want_d).abs().max() <= off * max(want_d.abs().max(), torch.finfo(dtype).tiny)


@pytest.mark.parametrize("strided", [False, True])
def test_gradient_over_the_logits(strided):
    logits, targets, grad = problem()
    if strided:
        logits = logits.t().contiguous().t()
    stats = kernels.selective_logprobs(logits, targets, 1.0, -100)[1]
    apart = kernels.selective_logprobs_backward(grad, logits.clone(), targets, stats, 1.0, -100)
    out = kernels.selective_logprobs_backward(grad, logits, targets, stats, 1.0, -100, in_place=True)
    assert out.data_ptr() == logits.data_ptr() and torch.equal(logits, apart)


def test_confident_rows_keep_their_relative_accuracy():
    logits, targets, grad = problem(rows=20)
    targets[:] = torch.arange(20)
    logits[torch.arange(20), targets] = torch.linspace(10, 60, 20)
    logprobs, stats = kernels.selective_logprobs(logits, targets, 1.0, -100)
    d = kernels.selective_logprobs_backward(grad, logits, targets, stats, 1.0, -100)
    others = logits.double().scatter(1, targets.unsqueeze(1), -math.inf)
    doubt = torch.sigmoid(others.logsumexp(1) - logits.double()[torch.arange(20), targets])
    relative = 64 * 16 * EPS
    assert ((logprobs - torch.log1p(-doubt)).abs() <= relative * doubt).all() and doubt.min() < EPS
    assert ((d[torch.arange(20), targets] - grad * doubt).abs() <= relative * (grad * doubt).abs()).all()


def test_a_target_that_overflowed_is_not_certain():
    logits, targets, grad = problem()
    logits[0, targets[0]] = math.inf
    logprobs, stats = kernels.selective_logprobs(logits, targets, 1.0, -100)
    d = kernels.selective_logprobs_backward(grad, logits, targets, stats, 1.0, -100)
    assert logprobs[0].isnan() and d[0].isnan().all() and logprobs[4:].isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_ignored_rows_are_zero_whatever_is_in_them(poison):
    logits, targets, grad = problem()
    logits[1], grad[1] = poison, poison
    logprobs, stats = kernels.selective_logprobs(logits, targets, 1.0, -100)
    d = kernels.selective_logprobs_backward(grad, logits, targets, stats, 1.0, -100)
    assert logprobs[1] == 0 and not d[1].any() and d.isfinite().all()


def test_masked_entries_and_rows_with_nothing_else():
    logits, targets, grad = problem()
    logits[:, 5:9] = -math.inf
    logits[4] = -math.inf
    logits[4, targets[4]] = 3.0
    targets[5] = 6
    logprobs, stats = kernels.selective_logprobs(logits, targets, 1.0, -100)
    d = kernels.selective_logprobs_backward(grad, logits, targets, stats, 1.0, -100)
    want, want_d = exact(logits, targets, grad, 1.0)
    assert logprobs[4] == 0 and logprobs[5] == -math.inf
    torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.double(), want_d, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 53, 2**40, -(2**62)])
def test_targets_out_of_range_touch_nothing_and_stand_out(target):
    memory = torch.full((9, 60), 1e9)
    memory[1:8, :53] = problem()[0]
    logits, targets, grad = memory[1:8, :53], problem()[1], problem()[2]
    before = memory.clone()
    targets[0] = target
    logprobs, stats = kernels.selective_logprobs(logits, targets, 1.0, -100)
    assert logprobs[0].isnan() and logprobs[1:].isfinite().all()
    assert torch.equal(memory, before)
    kernels.selective_logprobs_backward(grad, logits, targets, stats, 1.0, -100, in_place=True)
    assert (memory[:, 53:] == 1e9).all() and (memory[[0, 8]] == 1e9).all() and not memory[1, :53].any()


def test_no_rows():
    logits, targets, grad = problem()
    logprobs, stats = kernels.selective_logprobs(logits[:0], targets[:0], 1.0, -100)
    assert logprobs.shape == (0,)
    assert kernels.selective_logprobs_backward(grad[:0], logits[:0], targets[:0], stats, 1.0, -100).shape == (0, 53)


@pytest.mark.parametrize("in_place", [False, True])
def test_op(in_place):
    logits, targets, grad = problem()
    want, want_d = exact(logits, targets, grad, 0.7)
    leaf = logits.view(1, 7, 53).requires_grad_()
    out = selective_logprobs(
        leaf.clone(), targets.view(1, 7), temperature=0.7, inplace_backward=in_place, backend="triton"
    )
    (d,) = torch.autograd.grad(out, leaf, grad.view(1, 7))
    torch.testing.assert_close(out.double().view(7), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d.double().view(7, 53), want_d, rtol=1e-5, atol=1e-5)
