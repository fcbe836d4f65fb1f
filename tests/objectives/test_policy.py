"""The objective of online methods away from a ratio of 1: clipping, importance weights of the sampler, totals."""

from __future__ import annotations

import pytest
import torch

from fastalign.config.online import OnlineConfig
from fastalign.data.batch import Batch
from fastalign.data.packing import pack
from fastalign.objectives.policy import PolicyObjective

ROWS = [{"prompt_ids": [1], "completion_ids": [[2, 3, 4], [5]]}]


def objective(tmp_path, **options):
    return PolicyObjective(OnlineConfig(output_dir=str(tmp_path), **options))


def batch(**columns):
    return Batch(pack(ROWS), {"advantages": torch.tensor([1.0, -2.0]), **columns})


def test_clipping_stops_the_gradient_and_is_counted(tmp_path):
    old = torch.tensor([-1.0, -2.0, -1.5, -0.5])
    logprobs = (old + torch.tensor([0.5, 0.1, 0.0, -0.4])).requires_grad_()
    rule = objective(tmp_path, loss_type="dapo", epsilon_high=0.2)
    loss, metrics = rule(logprobs, None, batch(old_logprobs=old), rule.totals(batch()))
    loss.backward()
    # The first is above 1.2 with a positive advantage, the last below 0.8 with a negative one.
    assert logprobs.grad[0] == 0 == logprobs.grad[3] and logprobs.grad[2] == pytest.approx(-0.25)
    assert (metrics["clip_ratio/region_mean"][0] / metrics["clip_ratio/region_mean"][1]).item() == 0.5
    assert loss.item() == pytest.approx((-1.2 - 2.718281828**0.1 - 1 + 2 * 0.8) / 4, rel=1e-5)


def test_the_sampler_s_difference_weights_tokens_up_to_the_cap(tmp_path):
    logprobs = torch.tensor([-1.0, -2.0, -1.5, -0.5])
    drawn = logprobs - torch.tensor([0.1, 3.0, 0.0, -0.2])
    for cap, weights in ((2.0, [0.1, torch.log(torch.tensor(2.0)).item(), 0.0, -0.2]), (None, [0.0] * 4)):
        rule = objective(tmp_path, loss_type="dapo", importance_sampling_cap=cap)
        loss, metrics = rule(logprobs, None, batch(sampling_logprobs=drawn), rule.totals(batch()))
        w = torch.tensor(weights).exp()
        assert loss.item() == pytest.approx(((-w[:3].sum() + 2 * w[3]) / 4).item(), rel=1e-5)
        assert metrics["sampling/sampling_logp_difference/max"][0].item() == pytest.approx(3.0)


def test_what_is_left_out_counts_in_the_means(tmp_path):
    rule = objective(tmp_path, loss_type="grpo")
    given = batch(left_out=torch.tensor([3, 11]))
    totals = rule.totals(given)
    assert (totals.items.item(), totals.tokens.item(), totals.scored.item()) == (5, 15, 4)
    loss, _ = rule(torch.zeros(4), None, given, totals)
    assert loss.item() == pytest.approx((-1.0 + 2.0) / 5)
