"""csrc/cuda/selective_logprobs.cu, run on the CPU, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from fastalign import reference


def problem(dtype, n=9, vocab=1051, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, vocab, generator=generator, dtype=torch.float64) * 3).to(dtype)
    targets = torch.randint(vocab, (n,), generator=generator)
    targets[::4] = -100
    return logits, targets, torch.linspace(-1, 2, n)


def by_kernel(cuda, logits, targets, grad, temperature, **options):
    logprobs, stats = cuda.selective_logprobs(logits, targets, temperature, -100)
    return logprobs, cuda.selective_logprobs_backward(grad, logits, targets, stats, temperature, -100, **options)


def by_reference(logits, targets, grad, temperature):
    logits = logits.detach().clone().requires_grad_()
    logprobs = reference.selective_logprobs(logits, targets, temperature=temperature)
    logprobs.backward(grad.to(logprobs.dtype))
    return logprobs.detach(), logits.grad


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(cuda, dtype, temperature):
    """|ours - exact| <= 2 (|reference in the low precision - exact| + eps max|exact|)."""
    inputs = problem(dtype)
    ours = by_kernel(cuda, *inputs, temperature)
    plain = by_reference(*inputs, temperature)
    exact = by_reference(inputs[0].double(), *inputs[1:], temperature)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for a, p, e, eps in zip(ours, plain, exact, (torch.finfo(torch.float32).eps, torch.finfo(dtype).eps), strict=True):
        assert (a - e).abs().max() <= 2 * ((p - e).abs().max() + eps * e.abs().max())
    assert not ours[0][::4].any() and not ours[1][::4].any()


def test_a_target_that_overflowed_is_not_certain(cuda):
    logits, targets, grad = problem(torch.float16)
    logits[1, targets[1]], logits[2, targets[2]] = torch.inf, -torch.inf
    logprobs, d = by_kernel(cuda, logits, targets, grad, 1.0)
    assert logprobs[1].isnan() and d[1].isnan().all() and logprobs[2] == -torch.inf and logprobs[3].isfinite()
