"""Liger's GRPO and its relatives under our names, against sums over single tokens."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.compat import liger
from fastalign.compat.liger.policy import REDUCTIONS
from fastalign.errors import ConfigError, InputError

TEMPERATURE, BETA = 0.7, 0.1


def arguments(problem):
    """The tokens, the mask, advantages of both signs, and what the old policy gave the tokens."""
    generator = torch.Generator().manual_seed(2)
    mask = (problem.target >= 0).long()
    advantages = torch.tensor([0.5, -1.0, 2.0, -0.3, 0.8, -2.0], dtype=torch.float64)
    noise = 0.4 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    return problem.target.clamp(min=0), mask, advantages, scores(problem, problem[:3]).detach() + noise


def scores(problem, layer):
    """(B, T) log-probabilities of all tokens, those at the masked positions too."""
    logits = torch.nn.functional.linear(*layer) / TEMPERATURE
    return torch.log_softmax(logits, -1).gather(-1, problem.target.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def one_token(loss_type, logp, w, a, phi):
    if loss_type == "cispo":
        return -min(w.item(), 1.1) * a * logp
    if loss_type == "sapo":
        tau = 1.0 if a > 0 else 1.05
        return -a * 4 / tau / (1 + torch.exp(-tau * (w - 1)))
    if loss_type == "vespo":
        return -phi * a * logp
    return -torch.minimum(w.clamp(max=3.0) * a, w.clamp(0.8, 2.1) * a)


def expected(problem, loss_type, level):
    """The loss as loops over completions and tokens."""
    _, mask, advantages, old = arguments(problem)
    logps, ref = scores(problem, problem[:3]), scores(problem, problem.ref).detach()
    rows = []
    for b in range(len(mask)):
        on = mask[b].bool()
        ratio = logps[b] - old[b]
        whole = ratio[on].sum().item()
        k, rate = (2.0, 3.0) if advantages[b] >= 0 else (3.0, 2.0)
        phi = math.exp(rate + k * whole - rate * math.exp(whole))
        w = ratio.exp() if level == "token" else ratio[on].mean().exp().expand_as(ratio)
        kl = (ref[b] - logps[b]).exp() - (ref[b] - logps[b]) - 1
        losses = torch.stack([one_token(loss_type, logps[b, t], w[t], advantages[b], phi) for t in range(len(w))])
        rows.append((losses + BETA * kl, on))
    tokens = mask.sum()
    if loss_type in ("grpo", "sapo"):
        return sum(x[on].mean() for x, on in rows) / len(rows)
    if loss_type == "dr_grpo":
        return sum(x[on].sum() for x, on in rows) / (len(rows) * 40)
    if loss_type == "luspo":  # Liger does not mask
        return sum((x * on.sum()).mean() for x, on in rows) / len(rows)
    return sum(x[on].sum() for x, on in rows) / tokens


CASES = [(name, "token") for name in REDUCTIONS]
CASES += [(name, "sequence") for name in REDUCTIONS if name not in ("cispo", "sapo", "vespo")]


@pytest.mark.parametrize(("loss_type", "level"), CASES)
def test_against_loops_over_tokens(problem, loss_type, level):
    hidden, weight, bias, _, ref = problem
    tokens, mask, advantages, old = arguments(problem)
    module = liger.LigerFusedLinearGRPOLoss(
        beta=BETA, epsilon_high=1.1, loss_type=loss_type, importance_sampling_level=level, max_completion_length=40,
        temperature=TEMPERATURE, delta=3.0,
    )  # fmt: skip
    loss, metrics = module(
        hidden, weight, tokens, mask, advantages, bias, None, old, ref_input=ref[0], ref_weight=ref[1], ref_bias=ref[2]
    )
    problem.check((loss, ()), expected(problem, loss_type, level), ())
    assert len(metrics) == 2 and all(metric >= 0 and not metric.requires_grad for metric in metrics)


def test_metrics_count_scored_tokens(problem):
    hidden, weight, bias, _, ref = problem
    tokens, mask, advantages, old = arguments(problem)
    _, (kl, clipped) = liger.liger_fused_linear_grpo(
        hidden, weight, tokens, mask, advantages, bias, None, old, *ref, temperature=TEMPERATURE
    )
    ratio, on = (scores(problem, problem[:3]) - old).exp(), mask.bool()
    gap = scores(problem, problem.ref) - scores(problem, problem[:3])
    torch.testing.assert_close(kl, (gap.exp() - gap - 1)[on].mean().detach(), rtol=1e-10, atol=1e-12)
    each = advantages.unsqueeze(1)
    outside = ((ratio < 0.8) & (each < 0)) | ((ratio > 1.2) & (each > 0))
    torch.testing.assert_close(clipped, outside[on].double().mean(), rtol=1e-10, atol=1e-12)
    assert 0 < clipped < 1


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 6)], ids=str)
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_the_correction_for_the_sampler(problem, loss_type, shape):
    hidden, weight, bias = problem[:3]
    tokens, mask, advantages, old = arguments(problem)
    ratio = torch.full(shape, 0.5, dtype=torch.float64)

    def loss(**options):
        return liger.liger_fused_linear_grpo(
            hidden, weight, tokens, mask, advantages, bias, None, old, beta=0.0, use_ref_model=False,
            loss_type=loss_type, temperature=TEMPERATURE, **options,
        )[0]  # fmt: skip

    if loss_type == "dapo":
        torch.testing.assert_close(loss(vllm_is_ratio=ratio), 0.5 * loss(), rtol=1e-12, atol=0)
    else:  # it enters the weight of the completion, in log space
        assert loss(vllm_is_ratio=ratio) != loss()
    torch.testing.assert_close(loss(num_items_in_batch=2 * mask.sum()), loss() / 2, rtol=1e-6, atol=0)


def test_what_does_not_fit_says_so(problem):
    hidden, weight = problem[:2]
    tokens, mask, advantages, _ = arguments(problem)

    def call(**options):
        return liger.liger_fused_linear_grpo(hidden, weight, tokens, mask, advantages, **options)

    for loss_type in ("cispo", "sapo", "vespo"):
        with pytest.raises(ConfigError, match="Sequence-level importance sampling is not supported"):
            call(loss_type=loss_type, importance_sampling_level="sequence", use_ref_model=False)
    with pytest.raises(ConfigError, match="max_completion_length is None"):
        call(loss_type="dr_grpo", use_ref_model=False)
    with pytest.raises(InputError, match="use_ref_model is True, but there is no reference"):
        call()
    with pytest.raises(InputError, match=r"vllm_is_ratio is \(5,\); expected \(6,\)"):
        call(use_ref_model=False, vllm_is_ratio=torch.ones(5))
    for options, message in (
        ({"loss_type": "gppo"}, "did you mean 'grpo'"),
        ({"sapo_temperature_pos": 0}, "sapo_temperature_pos must be positive, got 0"),
        ({"delta": -1.0}, "delta must be positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            liger.LigerFusedLinearGRPOLoss(**options)
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
        call(ref_per_token_logps=torch.zeros(6, 6), ref_input=hidden, ref_weight=weight)


def test_the_base_scores_tokens(problem):
    result = liger.LigerFusedLinearPPOBase.chunk_forward(*problem[:2], problem.target.clamp(min=0), problem.bias, 0.7)
    torch.testing.assert_close(result, scores(problem, problem[:3]), rtol=1e-11, atol=1e-12)
    assert issubclass(liger.LigerFusedLinearGRPOFunction, liger.LigerFusedLinearPPOBase)
    assert liger.LigerFusedLinearGRPOFunction.apply is liger.liger_fused_linear_grpo
