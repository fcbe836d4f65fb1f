"""selective_logprobs against the float64 reference, with several chunks even of small logits."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from fastalign import reference, selective_logprobs
from fastalign.errors import BackendError, InputError

N, V = 23, 31


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of four rows, so that there are six."""
    monkeypatch.setattr(sys.modules["fastalign.ops.selective_logprobs"], "_CHUNK", 4 * V)


def problem(dtype=torch.float32, ignored=0.3, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64) * spread
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[: round(ignored * N)]] = -100
    return logits.to(dtype), targets


def evaluate(function, logits, targets, **options):
    logits = logits.detach().clone().requires_grad_()
    logprobs = function(logits, targets, **options)
    (logprobs * torch.linspace(-1, 2, targets.numel()).view(targets.shape)).sum().backward()
    return logprobs.detach(), logits.grad


@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype, temperature, ignored):
    """|ours - exact| <= 2 (|reference in the low precision - exact| + eps max|exact|)."""
    logits, targets = problem(dtype, ignored)
    ours = evaluate(selective_logprobs, logits, targets, temperature=temperature)
    plain = evaluate(reference.selective_logprobs, logits, targets, temperature=temperature)
    exact = evaluate(reference.selective_logprobs, logits.double(), targets, temperature=temperature)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert ours[0].dtype == computed and ours[1].dtype == dtype
    for a, p, e, eps in zip(ours, plain, exact, (torch.finfo(computed).eps, torch.finfo(dtype).eps), strict=True):
        if dtype == torch.float64:  # the reference is no truer: V rounded additions make a sum
            eps *= V
        assert (a - e).abs().max() <= 2 * ((p - e).abs().max() + eps * e.abs().max())
    assert not ours[0][targets < 0].any() and not ours[1][targets < 0].any()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(temperature):
    logits, targets = problem(torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: selective_logprobs(z, targets[:9], temperature=temperature), logits[:9].requires_grad_()
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_ignored_rows_hold_anything_and_change_nothing(poison):
    logits, targets = problem()
    poisoned = logits.masked_fill((targets < 0).unsqueeze(1), poison)
    assert all(map(torch.equal, evaluate(selective_logprobs, poisoned, targets),
                   evaluate(selective_logprobs, logits, targets)))  # fmt: skip


def test_masked_vocabulary_entries_and_large_logits():
    logits, targets = problem(ignored=0.0, spread=60.0)
    logits[:, ::5] = -math.inf
    targets = torch.where(targets % 5 == 0, targets + 1, targets).clamp(max=V - 2)
    logprobs, grad = evaluate(selective_logprobs, logits, targets)
    exact, exact_grad = evaluate(reference.selective_logprobs, logits.double(), targets)
    assert logprobs.isfinite().all() and not grad[:, ::5].any()
    eps = torch.finfo(torch.float32).eps
    largest = logits[logits.isfinite()].abs().max()
    # z_y and logsumexp are each rounded at the size of the logits, and so is z - logsumexp before its exponential.
    assert (logprobs - exact).abs().max() <= 4 * eps * largest
    assert (grad - exact_grad).abs().max() <= 2 * 4 * eps * largest


def test_no_second_copy_of_the_logits(monkeypatch):
    """What the backward pass keeps is the logits it was given, and three numbers a row."""
    logits, targets = problem()
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        selective_logprobs(logits, targets)
    assert sum(t.numel() for t in kept if t.data_ptr() != logits.data_ptr()) == 3 * N


def test_shapes_and_strides():
    logits, targets = problem(torch.float64, ignored=0.0)
    expected = evaluate(selective_logprobs, logits, targets)
    strided = logits.t().contiguous().t()
    assert not strided.is_contiguous()
    torch.testing.assert_close(evaluate(selective_logprobs, strided, targets), expected, rtol=1e-13, atol=1e-13)
    cube = evaluate(selective_logprobs, logits[:20].view(4, 5, V), targets[:20].view(4, 5))
    assert cube[0].shape == (4, 5) and torch.equal(cube[0].view(20), expected[0][:20])
    assert selective_logprobs(logits[:0], targets[:0]).shape == (0,)
    assert selective_logprobs(logits[0], targets[0]).shape == ()


def test_reference_backend_and_another_ignore_index():
    logits, targets = problem(ignored=0.0)
    targets[:5] = 7
    by_reference = selective_logprobs(logits, targets, ignore_index=7, backend="reference")
    assert torch.equal(by_reference, reference.selective_logprobs(logits, targets, ignore_index=7))
    assert torch.equal(selective_logprobs(logits, targets, ignore_index=7) == 0, targets == 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.zeros(N, V, dtype=torch.int64)}, ("logits is torch.int64", "floating")),
        ({"targets": torch.zeros(N - 1, dtype=torch.int64)}, ("(22,)", "(23,)")),
        ({"targets": torch.zeros(N)}, ("torch.float32", "int64")),
        ({"targets": torch.full((N,), V)}, ("31", "[0, 31)", "ignore_index=-100")),
        ({"targets": torch.full((N,), -1)}, ("-1", "[0, 31)", "ignore_index=-100")),
        ({"temperature": -1.0}, ("temperature is -1.0", "above 0")),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else next(iter(value)),
)
def test_errors_say_what_was_found_and_what_to_do(change, words):
    logits, targets = problem()
    with pytest.raises(InputError) as error:
        selective_logprobs(**({"logits": logits, "targets": targets} | change))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_backend_lists_the_known():
    with pytest.raises(BackendError, match=r"'tpu'.*auto, reference, torch"):
        selective_logprobs(*problem(), backend="tpu")
