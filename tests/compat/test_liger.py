"""Liger's modules under our names, against their formulas on log-probabilities from the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from fastalign import reference
from fastalign.compat import liger
from fastalign.errors import ConfigError

B, T, H, V = 3, 6, 5, 17


def problem():
    """hidden, weight, target, bias and a reference's (hidden, weight, bias); float64, chosen rows first."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(V, (2 * B, T), generator=generator)
    target[:, 0] = target[2, 3:] = target[5, 4:] = -100
    policy = random(2 * B, T, H).requires_grad_(), random(V, H).requires_grad_(), random(V).requires_grad_()
    return *policy, target, (random(2 * B, T, H), random(V, H), random(V))


def sums_and_lengths(hidden, weight, bias, target):
    return reference.linear_logprobs(hidden, weight, target, bias=bias).sum(1), (target >= 0).sum(1)


def check(result, expected_loss, expected_aux, *inputs):
    loss, aux = result
    torch.testing.assert_close([loss, *aux], [expected_loss, *expected_aux], rtol=1e-11, atol=1e-12)
    grads = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected_loss, inputs)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def common(hidden, weight, bias, target, logps, nll):
    """The first five of Liger's auxiliary outputs."""
    logits = (hidden @ weight.t() + bias).detach()
    return (*logps.detach().chunk(2), logits[:B].mean(), logits[B:].mean(), nll.detach())


@pytest.mark.parametrize("average", [False, True], ids=["sums", "averages"])
@pytest.mark.parametrize(
    ("loss_type", "formula"),
    [
        ("sigmoid", lambda u, v: -logsigmoid(u - v)),  # Liger does not smooth this one
        ("hinge", lambda u, v: torch.relu(1 - (u - v))),
        ("robust", lambda u, v: (-0.9 * logsigmoid(u - v) + 0.1 * logsigmoid(v - u)) / 0.8),
        ("nca_pair", lambda u, v: -logsigmoid(u) - 0.5 * logsigmoid(-u) - 0.5 * logsigmoid(-v)),
        ("sppo_hard", lambda u, v: (u / 0.2 - 2.5) ** 2 + (v / 0.2 + 2.5) ** 2),
        ("apo_zero", lambda u, v: 1 - torch.sigmoid(u) + torch.sigmoid(v)),
    ],
)
def test_dpo(loss_type, formula, average):
    hidden, weight, bias, target, ref = problem()
    sums, lengths = sums_and_lengths(hidden, weight, bias, target)
    nll = -sums[:B].sum() / lengths[:B].sum()
    scale = lengths if average else 1
    rewards = 0.2 * (sums - sums_and_lengths(*ref, target)[0]) / scale
    loss = formula(*rewards.chunk(2)).mean() + 0.3 * nll
    module = liger.LigerFusedLinearDPOLoss(
        beta=0.2, alpha=0.3, compute_nll_loss=True, average_log_prob=average, loss_type=loss_type, label_smoothing=0.1
    )
    aux = (*common(hidden, weight, bias, target, sums / scale, nll), *rewards.detach().chunk(2))
    check(module(weight, hidden, target, bias, *ref), loss, aux, hidden, weight, bias)


def test_dpo_without_a_reference():
    hidden, weight, bias, target, _ = problem()
    sums, _ = sums_and_lengths(hidden, weight, bias, target)
    result = liger.LigerFusedLinearDPOLoss(use_ref_model=False)(weight, hidden, target, bias)
    torch.testing.assert_close(result[0], -logsigmoid(0.1 * (sums[:B] - sums[B:])).mean(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("whole", [False, True], ids=["completion", "prompt and completion"])
def test_orpo(whole):
    hidden, weight, bias, target, _ = problem()
    nll_target = target.clone()
    nll_target[:, 0] = 4
    sums, lengths = sums_and_lengths(hidden, weight, bias, target)
    nll_sums, nll_lengths = sums_and_lengths(hidden, weight, bias, nll_target if whole else target)
    nll = -nll_sums[:B].sum() / nll_lengths[:B].sum()
    average = sums / lengths
    odds = average - torch.log(1 - average.exp())
    log_odds = odds[:B] - odds[B:]
    loss = nll - 0.3 * logsigmoid(log_odds).mean()
    extra = (*(0.3 * average).detach().chunk(2), logsigmoid(log_odds).mean().detach(), log_odds.mean().detach())
    result = liger.LigerFusedLinearORPOLoss(beta=0.3)(weight, hidden, target, bias, nll_target if whole else None)
    check(result, loss, (*common(hidden, weight, bias, target, average, nll), *extra), hidden, weight, bias)


def test_simpo():
    hidden, weight, bias, target, _ = problem()
    sums, lengths = sums_and_lengths(hidden, weight, bias, target)
    nll, average = -sums[:B].sum() / lengths[:B].sum(), sums / lengths
    x = 2.0 * (average[:B] - average[B:]) - 0.7
    loss = 0.4 * nll - 0.9 * logsigmoid(x).mean() - 0.1 * logsigmoid(-x).mean()
    module = liger.LigerFusedLinearSimPOLoss(beta=2.0, alpha=0.4, label_smoothing=0.1, gamma=0.7)
    aux = (*common(hidden, weight, bias, target, average, nll), *(2.0 * average).detach().chunk(2))
    check(module(weight, hidden, target, bias), loss, aux, hidden, weight, bias)


@pytest.mark.parametrize("average", [False, True], ids=["sums", "averages"])
def test_cpo(average):
    hidden, weight, bias, target, _ = problem()
    sums, lengths = sums_and_lengths(hidden, weight, bias, target)
    nll, logps = -sums[:B].sum() / lengths[:B].sum(), sums / lengths if average else sums
    x = 0.3 * (logps[:B] - logps[B:])
    loss = 0.4 * nll - 0.9 * logsigmoid(x).mean() - 0.1 * logsigmoid(-x).mean()
    module = liger.LigerFusedLinearCPOLoss(beta=0.3, alpha=0.4, label_smoothing=0.1, average_log_prob=average)
    aux = (*common(hidden, weight, bias, target, logps, nll), *(0.3 * logps).detach().chunk(2))
    check(module(weight, hidden, target, bias), loss, aux, hidden, weight, bias)


@pytest.mark.parametrize("with_reference", [False, True])
def test_kto(with_reference):
    hidden, weight, bias, target, ref = problem()
    labels = torch.tensor([True, False, True, True, False, False])
    sums, _ = sums_and_lengths(hidden, weight, bias, target)
    rewards = 0.3 * (sums - (sums_and_lengths(*ref, target)[0] if with_reference else 0))
    sign = torch.where(labels, 1, -1)
    loss = (1 - torch.sigmoid((rewards - 0.3 * 0.5) * sign)).mean()
    logits = (hidden @ weight.t() + bias).sum((1, 2))
    aux = [t[rows].sum().detach() for t in (sums, logits, rewards) for rows in (labels, ~labels)]
    module = liger.LigerFusedLinearKTOLoss(beta=0.3, use_ref_model=with_reference)
    result = module(hidden, weight, target, bias, labels, *(ref if with_reference else ()), kl=torch.tensor(0.5))
    check(result, loss, aux, hidden, weight, bias)


def test_what_is_not_offered_says_so():
    with pytest.raises(ConfigError, match="average_log_prob is True; KTO is defined on sums"):
        liger.LigerFusedLinearKTOLoss(average_log_prob=True)


def test_without_an_ignore_index_every_position_is_scored():
    hidden, weight, bias, target, _ = problem()
    target = target.clamp(min=0)
    expected = liger.LigerFusedLinearCPOLoss(average_log_prob=True)(weight, hidden, target, bias)
    module = liger.LigerFusedLinearCPOLoss(ignore_index=None, average_log_prob=True)
    check(module(weight, hidden, target, bias), *expected, hidden, weight, bias)


def test_other_ignore_index_and_low_precision():
    hidden, weight, _, target, _ = problem()
    low = hidden.detach().bfloat16(), weight.detach().bfloat16()
    loss, aux = liger.LigerFusedLinearCPOLoss(ignore_index=-7)(low[1], low[0], target.where(target >= 0, -7))
    again, _ = liger.LigerFusedLinearCPOLoss()(low[1], low[0], target)
    assert torch.equal(loss, again) and math.isfinite(loss)
    assert all(t.dtype == torch.float32 for t in (loss, *aux))
