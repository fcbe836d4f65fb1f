"""The objective of losses over pairs."""

import pytest
import torch

from fastalign.config.preference import PreferenceConfig
from fastalign.losses import dpo, orpo
from fastalign.objectives.preference import PreferenceObjective

LENGTHS = [(2, 3), (4, 1), (1, 5), (3, 3)]


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dpo"},
        {"loss_type": "orpo"},
        {"loss_type": "dpo_norm"},
        {"loss_type": ["dpo", "ipo", "sft"], "loss_weights": [0.5, 2.0, 3.0]},
        {"loss_type": "hinge", "nll_weight": 0.5},
    ],
)
@pytest.mark.parametrize("cut", [1, 3])
def test_micro_batches_add_up_to_the_whole_batch(make_batch, make_logprobs, in_parts, options, cut):
    objective = PreferenceObjective(PreferenceConfig(**options))
    logprobs, reference, batch = make_logprobs(LENGTHS), make_logprobs(LENGTHS, seed=1), make_batch(LENGTHS)
    reference = reference if objective.needs_reference else None
    whole, _ = objective(logprobs, reference, batch, objective.totals(batch))
    parts = in_parts(objective, LENGTHS, logprobs, reference, cut)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


def test_mixture_with_nll_is_its_terms(make_batch, make_logprobs, sums):
    config = PreferenceConfig(loss_type=["dpo", "sft"], loss_weights=[2.0, 0.5], nll_weight=0.25, beta=0.3)
    objective, batch = PreferenceObjective(config), make_batch(LENGTHS)
    logprobs, reference = make_logprobs(LENGTHS), make_logprobs(LENGTHS, seed=1)
    loss, metrics = objective(logprobs, reference, batch, objective.totals(batch))
    chosen, rejected = sums(logprobs, LENGTHS)
    ref_chosen, ref_rejected = sums(reference, LENGTHS)
    nll = -chosen.sum() / sum(c for c, _ in LENGTHS)
    expected = 2 * dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.3).mean() + 0.75 * nll
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    total, count = metrics["nll_loss"]
    assert (total / count).item() == pytest.approx(nll.item(), rel=1e-12)


def test_orpo_averages_over_tokens_and_adds_the_nll(make_batch, make_logprobs, sums):
    objective, batch = PreferenceObjective(PreferenceConfig(loss_type="orpo")), make_batch(LENGTHS)
    logprobs = make_logprobs(LENGTHS)
    loss, _ = objective(logprobs, None, batch, objective.totals(batch))
    chosen, rejected = sums(logprobs, LENGTHS)
    lengths = torch.tensor(LENGTHS)
    expected = orpo(chosen / lengths[:, 0], rejected / lengths[:, 1]).mean() - chosen.sum() / lengths[:, 0].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_metrics_are_sums_and_counts_without_a_graph(make_batch, make_logprobs, sums):
    objective, batch = PreferenceObjective(PreferenceConfig(beta=0.5)), make_batch(LENGTHS)
    logprobs, reference = make_logprobs(LENGTHS).requires_grad_(), make_logprobs(LENGTHS, seed=1)
    _, metrics = objective(logprobs, reference, batch, objective.totals(batch))
    assert not any(part.requires_grad for pair in metrics.values() for part in pair)
    chosen, rejected = ((a - b) * 0.5 for a, b in zip(sums(logprobs, LENGTHS), sums(reference, LENGTHS), strict=True))
    expected = {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
        "logps/chosen": sums(logprobs, LENGTHS)[0].sum(),
    }
    for name, value in expected.items():
        total, count = metrics[name]
        assert total.item() == pytest.approx(value.item(), rel=1e-12), name
        assert count.item() == 4
    lengths = torch.tensor(LENGTHS)
    per_token = torch.stack(sums(logprobs, LENGTHS), 1) / lengths
    assert metrics["logps/accuracies"][0].item() == (per_token[:, 0] > per_token[:, 1]).sum().item()


def test_equal_rewards_count_half(make_batch, make_logprobs):
    objective, batch = PreferenceObjective(PreferenceConfig()), make_batch(LENGTHS)
    logprobs = make_logprobs(LENGTHS)
    _, metrics = objective(logprobs, logprobs, batch, objective.totals(batch))
    total, count = metrics["rewards/accuracies"]
    assert total.item() == count.item() / 2  # at the start of every run: 50 %, not 0 %
