"""TRL's selective_log_softmax under our name, against log_softmax and gather."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.compat.trl import selective_log_softmax

B, T, V = 2, 5, 13
INDICES = {"one a position": (B, T), "K a position": (B, T, 4)}


def problem(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(V, shape, generator=generator)


def naive(logits, index, temperature=1.0):
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(-1, index) if index.dim() == 3 else logprobs.gather(-1, index.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", INDICES.values(), ids=INDICES)
def test_values_and_gradients(shape, temperature):
    logits, index = problem(shape)
    logprobs, expected = selective_log_softmax(logits, index, temperature), naive(logits, index, temperature)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    coefficients = torch.linspace(-1, 2, index.numel(), dtype=torch.float64).view(shape)
    grads = [torch.autograd.grad((out * coefficients).sum(), logits)[0] for out in (logprobs, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", INDICES.values(), ids=INDICES)
def test_row_mask(shape):
    logits, index = problem(shape)
    mask = torch.arange(index.numel()).view(shape) % 3
    logprobs = selective_log_softmax(logits, index, row_mask=mask)
    torch.testing.assert_close(logprobs, naive(logits, index).masked_fill(mask == 0, 0.0), rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(logprobs[mask == 0].sum(), logits)
    assert not grad.any()


@pytest.mark.parametrize("shape", INDICES.values(), ids=INDICES)
def test_low_precision_is_as_good_as_float32(shape):
    logits, index = problem(shape, torch.bfloat16)
    logprobs = selective_log_softmax(logits, index)
    assert logprobs.dtype == torch.float32
    # A difference of numbers as large as the logits, each rounded in float32, and V exponentials summed.
    bound = torch.finfo(torch.float32).eps * (4 * logits.abs().max().item() + V)
    assert (logprobs - naive(logits.double(), index)).abs().max() <= bound


def test_masked_vocabulary_entries():
    logits, index = problem((B, T, 4))
    logits = logits.detach().index_fill(-1, torch.arange(0, V, 2), -math.inf)
    logprobs = selective_log_softmax(logits, index)
    assert torch.equal(logprobs.isneginf(), index % 2 == 0) and not logprobs.isnan().any()
    torch.testing.assert_close(logprobs, naive(logits, index), rtol=1e-12, atol=1e-12)
