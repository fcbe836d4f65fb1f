"""Policy-gradient losses against formulas for single tokens in float64, and at the ends of what a float can hold."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.errors import InputError
from fastalign.losses import policy

MASK = torch.tensor([[1.0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)


def random(seed):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(loss, formula, *given):
    """loss equals formula(b, t, *values of one token) everywhere, and so do the gradients in the first tensor."""
    expected = torch.stack([torch.stack([formula(b, *(g[b, t] for g in given)) for t in range(4)]) for b in range(3)])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    slopes = [torch.autograd.grad(value.sum(), given[0], retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("delta", [None, 1.5])
def test_ppo_clip(delta):
    def formula(b, x):
        w, bound = x.exp(), math.inf if delta is None else delta
        a = ADVANTAGES[b]
        return -torch.stack([w.clamp(max=bound) * a, w.clamp(0.9, 1.3) * a]).min()

    x = (1.01 * random(0)).requires_grad_()
    loss = policy.ppo_clip(x, ADVANTAGES, epsilon_low=0.1, epsilon_high=0.3, delta=delta)
    expected = torch.stack([torch.stack([formula(b, x[b, t]) for t in range(4)]) for b in range(3)])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    # Where both products are equal torch splits the gradient in another way, which the mean over tokens cannot see.
    slopes = [torch.autograd.grad(value[:2].sum(), x, retain_graph=True)[0] for value in (loss, expected)]
    inside = ((x.exp() > 0.9) & (x.exp() < 1.3))[:2]
    torch.testing.assert_close(slopes[0][:2][~inside], slopes[1][:2][~inside], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slopes[0][:2][inside], (-x.exp() * ADVANTAGES.unsqueeze(1))[:2][inside].detach())


def test_cispo_sapo():
    logprobs, x = (-random(1).abs()).requires_grad_(), random(0).requires_grad_()
    loss = policy.cispo(logprobs, x, ADVANTAGES, epsilon_high=1.2)
    check(loss, lambda b, logp, x: -min(x.detach().exp(), 1.2) * ADVANTAGES[b] * logp, logprobs, x)
    assert torch.autograd.grad(loss.sum(), x, allow_unused=True)[0] is None

    def gate(b, x):
        tau = 0.7 if ADVANTAGES[b] > 0 else 1.4
        return -ADVANTAGES[b] * 4 / tau / (1 + torch.exp(-tau * (x.exp() - 1)))

    check(policy.sapo(x, ADVANTAGES, temperature_pos=0.7, temperature_neg=1.4), gate, x)


def test_where_clipping_stops_the_gradient():
    x = random(0).requires_grad_()
    (slope,) = torch.autograd.grad(policy.ppo_clip(x, ADVANTAGES).sum(), x)
    stopped = (slope == 0) & (ADVANTAGES != 0).unsqueeze(1)
    clipped = policy.is_clipped(x, ADVANTAGES)
    assert torch.equal(clipped, stopped) and 0 < clipped.sum() < clipped.numel()
    only_above = policy.is_clipped(x, ADVANTAGES, epsilon_low=None)
    assert torch.equal(only_above, clipped & (x > 0))


def test_importance_weights():
    logprobs, old = random(2).requires_grad_(), random(3)
    old[MASK == 0] = math.nan  # what is not scored must not matter
    token = policy.log_importance_weights(logprobs, old, MASK)
    assert torch.equal(token[MASK == 0], torch.zeros(4, dtype=torch.float64))
    sequence = policy.log_importance_weights(logprobs, old, MASK, level="sequence")
    for b in range(3):
        on = MASK[b] == 1
        torch.testing.assert_close(token[b, on], (logprobs - old)[b, on])
        torch.testing.assert_close(sequence[b, 0], (logprobs - old)[b, on].mean())
    (slope,) = torch.autograd.grad(sequence.sum(), logprobs)
    assert slope.isfinite().all() and not slope[MASK == 0].any()


def test_kl_is_an_unbiased_estimate_for_sampled_tokens():
    policy_probs, ref_probs = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    values = policy.kl_to_reference(policy_probs.log()[None], ref_probs.log()[None], torch.ones(1, 3))
    assert (values >= 0).all()
    exact = (policy_probs * (policy_probs / ref_probs).log()).sum()
    torch.testing.assert_close((policy_probs * values[0]).sum(), exact, rtol=1e-14, atol=0)
    near = policy.kl_to_reference(torch.tensor([[1e-4]]), torch.zeros(1, 1), torch.ones(1, 1))
    assert abs(near.item() / 5e-9 - 1) < 0.02  # half the square: exp(x) - x - 1 in float32 has no digits left there


def test_vespo_weights():
    x, sampler = random(0), random(4).exp()
    weights = policy.vespo_weights(x, ADVANTAGES, MASK, k_neg=2.5, lambda_pos=1.5)
    corrected = policy.vespo_weights(x, ADVANTAGES, MASK, sampler_ratio=sampler, k_neg=2.5, lambda_pos=1.5)
    for b in range(3):
        whole = (x * MASK)[b].sum().exp()
        k, rate = (2.0, 1.5) if ADVANTAGES[b] >= 0 else (2.5, 2.0)
        for result, w in ((weights, whole), (corrected, whole * sampler[b].prod())):
            torch.testing.assert_close(result[b, 0], math.exp(rate) * w**k * torch.exp(-rate * w), rtol=1e-10, atol=0)
    assert policy.vespo_weights(torch.zeros(3, 4), ADVANTAGES, MASK).eq(1).all()


def test_reductions():
    per_token = random(5)
    per_token[MASK == 0] = math.inf
    on = MASK == 1
    rows = [per_token[b, on[b]] for b in range(3)]
    reduce = policy.reduce_tokens
    torch.testing.assert_close(reduce(per_token, MASK, "sequence_mean"), sum(row.mean() for row in rows) / 3)
    total = sum(row.sum() for row in rows)
    torch.testing.assert_close(reduce(per_token, MASK, "token_mean"), total / 8)
    torch.testing.assert_close(reduce(per_token, MASK, "token_mean", num_items=20), total / 20)
    torch.testing.assert_close(reduce(per_token, MASK, "fixed_length", max_length=9), total / 27)
    each = random(6)[:, :1]
    torch.testing.assert_close(reduce(each, MASK, "length_weighted"), (each[:, 0] * MASK.sum(1)).mean())
    assert reduce(per_token, torch.zeros_like(MASK), "token_mean") == 0  # nothing is scored


@pytest.mark.parametrize("size", [90.0, 1e4, -1e4])
def test_far_log_ratios_stay_finite(size):
    mask = torch.ones(2, 1)
    x = torch.full((2, 1), size, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0])
    losses = [
        policy.ppo_clip(x, advantages), policy.sapo(x, advantages), policy.cispo(x, x, advantages, epsilon_high=5.0),
        policy.kl_to_reference(x, torch.zeros(2, 1), mask), policy.kl_to_reference(torch.zeros(2, 1) * x, -x, mask),
        policy.vespo_weights(x, advantages, mask) * x,
    ]  # fmt: skip
    for loss in losses:
        (slope,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        assert loss.isfinite().all() and slope.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: policy.log_importance_weights(t, t, MASK, level="word"), "level is 'word'"),
        (lambda t: policy.log_importance_weights(t, t[:2], MASK), "old_logprobs is a .2, 4."),
        (lambda t: policy.kl_to_reference(t, t[:, :1], MASK), "ref_logprobs is a .3, 1."),
        (lambda t: policy.ppo_clip(t, ADVANTAGES, delta=0.0), "delta is 0.0"),
        (lambda t: policy.sapo(t, ADVANTAGES, temperature_neg=0.0), "temperature_neg is 0.0"),
        (lambda t: policy.reduce_tokens(t, MASK, "mean"), "reduction is 'mean'"),
        (lambda t: policy.reduce_tokens(t, MASK, "fixed_length"), "max_length is None"),
    ],
)
def test_what_does_not_fit_says_so(call, message):
    with pytest.raises(InputError, match=message):
        call(random(0))
