"""linear_token_statistics against softmax in float64: values, gradients, ties, and what a caller does not pay for."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.errors import InputError
from fastalign.ops import linear_logprobs, linear_token_statistics

N, H, V = 37, 24, 1301  # several chunks of the vocabulary, and ragged ones
OPTIONS = [{}, {"logit_scale": -0.6, "softcap": 3.0, "temperature": 0.7}]


def problem(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(V, H, generator=generator, dtype=torch.float64), torch.randn(V, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    targets[: N // 2] = (hidden @ weight.T + bias)[: N // 2].argmax(1)  # so that some are on top
    return hidden.to(dtype), weight.to(dtype), targets, bias.to(dtype)


def definition(hidden, weight, targets, *, bias, logit_scale=1.0, softcap=None, temperature=1.0):
    z = (hidden @ weight.T + bias) * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    p = torch.softmax(z, -1)
    log_p = torch.log_softmax(z, -1)
    return (
        log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(p * log_p).sum(-1), z.mean(-1), p.square().sum(-1).log(),
        z.argmax(-1) == targets,
    )  # fmt: skip


def gradients(out, leaves):
    coefficients = torch.linspace(-1, 2, N, dtype=torch.float64)
    return torch.autograd.grad((coefficients * (out[0] + 2 * out[1])).sum(), leaves)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "capped"])
def test_values_and_gradients(backend, frozen, options):
    hidden, weight, targets, bias = problem()
    leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_(), bias.requires_grad_()])
    out = linear_token_statistics(hidden, weight, targets, bias=bias, backend=backend, **options)
    expected = definition(hidden, weight, targets, bias=bias, **options)
    assert 0 < expected[4].sum() < N or options, "some targets are on top, some are not"
    for actual, value in zip(out, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-10, atol=1e-10)
    assert not any(value.requires_grad for value in out[2:])
    for actual, value in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_logprobs_have_the_bits_of_linear_logprobs(dtype, trained):
    hidden, weight, targets, bias = problem(dtype)
    weight.requires_grad_(trained)
    out = linear_token_statistics(hidden.requires_grad_(), weight, targets, bias=bias, backend="cpu")
    plain = linear_logprobs(hidden, weight, targets, bias=bias, backend="cpu")
    assert torch.equal(out.logprobs, plain)
    leaves = [hidden, weight] if trained else [hidden]
    mine, theirs = (torch.autograd.grad(value.sum(), leaves) for value in (out.logprobs, plain))
    assert all(map(torch.equal, mine, theirs)), "the entropy that nothing used changes no gradient"
    exact = definition(hidden.double(), weight.double(), targets, bias=bias.double())
    for actual, value in zip(out[1:4], exact[1:4], strict=True):
        assert (actual - value).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_of_equal_logits_the_first_is_on_top(backend):
    hidden, weight = torch.ones(4, H), torch.zeros(V, H)
    for tied in ((3, 4), (3, 900)):  # in one tile, and in different chunks
        bias = torch.zeros(V).index_fill_(0, torch.tensor(tied), 1.0)
        targets = torch.tensor([*tied, 0, V - 1])
        out = linear_token_statistics(hidden, weight, targets, bias=bias, backend=backend)
        assert out.is_top1.tolist() == [True, False, False, False]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ruled_out_entries_and_no_rows(backend):
    hidden, weight, targets, bias = problem(torch.float32)
    bias = torch.full((V,), -math.inf).index_fill_(0, targets, 0.0)
    out = linear_token_statistics(hidden, weight, targets, bias=bias, backend=backend)
    assert out.logprobs.isfinite().all() and out.entropy.isfinite().all() and out.log_sum_sq_probs.isfinite().all()
    assert out.mean_logit.isneginf().all()
    none = linear_token_statistics(hidden[:0].requires_grad_(), weight, targets[:0], entropy=False, backend=backend)
    assert none.entropy is None and none.logprobs.shape == (0,) and none.logprobs.requires_grad


def test_every_row_needs_a_target():
    hidden, weight, targets, _ = problem()
    with pytest.raises(InputError, match="-100"):
        linear_token_statistics(hidden, weight, targets.index_fill(0, torch.tensor([1]), -100))
