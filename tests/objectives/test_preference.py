"""The objective of losses over pairs."""

import pytest
import torch

from fastalign.config.preference import PreferenceConfig
from fastalign.losses import PAIRWISE, dpo, orpo
from fastalign.objectives.base import ALIGNED
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


# Variants of TRL 1.16's DPOTrainer, each as its paper writes it. On two tiny models TRL's trainer gives the same losses
# within 1e-6, and gradients within 3e-5 of their largest entry (3e-4 for discopop under the forward KL).


def ratios(logprobs, reference, sums, weights=1.0):
    """(pairs,) log-ratios of the chosen and of the rejected completions."""
    return [a - b for a, b in zip(sums(logprobs * weights, LENGTHS), sums(reference * weights, LENGTHS), strict=True)]


SCORES = {
    "forward_kl": lambda a: 1 - torch.exp(-a),
    "js_divergence": lambda a: torch.log(2 * a.exp() / (a.exp() + 1)),
    "alpha_divergence": lambda a: (a.exp() ** (0.3 - 1) - 1) / (0.3 - 1),
}


@pytest.mark.parametrize("loss", ["hinge", "ipo", "robust", "exo", "discopop", "dpo_norm", "dpo"])
@pytest.mark.parametrize("divergence", SCORES)
def test_other_divergences_take_the_place_of_the_log_ratios(make_batch, make_logprobs, sums, divergence, loss):
    given = {"f_alpha_divergence_coef": 0.3} if divergence == "alpha_divergence" else {}
    config = PreferenceConfig(loss_type=loss, beta=0.7, f_divergence_type=divergence, **given)
    objective, batch = PreferenceObjective(config), make_batch(LENGTHS)
    logprobs, reference = make_logprobs(LENGTHS), make_logprobs(LENGTHS, seed=1)
    u, v = map(SCORES[divergence], ratios(logprobs, reference, sums))
    lengths = torch.tensor(LENGTHS).unbind(1)
    if loss in ("ipo", "dpo_norm"):
        u, v = u / lengths[0], v / lengths[1]
    zero = torch.zeros_like(u)
    expected = PAIRWISE[loss].function(u, v, zero, zero, beta=0.7).mean()
    assert objective(logprobs, reference, batch, objective.totals(batch))[0].item() == pytest.approx(expected.item())
    if divergence == "alpha_divergence" and loss == "dpo":
        same = PreferenceObjective(PreferenceConfig(loss_type="dpo_alpha", beta=0.7, alpha=0.7))
        assert expected.item() == pytest.approx(same(logprobs, reference, batch, same.totals(batch))[0].item())


def test_ld_alpha_weighs_what_one_completion_has_more_than_the_other(make_batch, make_logprobs, sums):
    config = PreferenceConfig(loss_type=["dpo", "sft"], beta=0.7, ld_alpha=0.25)
    objective, batch = PreferenceObjective(config), make_batch(LENGTHS)
    logprobs, reference = make_logprobs(LENGTHS), make_logprobs(LENGTHS, seed=1)
    weights = [1.0 if t < min(pair) else 0.25 for pair in LENGTHS for n in pair for t in range(n)]
    u, v = ratios(logprobs, reference, sums, torch.tensor(weights, dtype=torch.float64))
    nll = -sums(logprobs, LENGTHS)[0].sum() / sum(c for c, _ in LENGTHS)  # which stays as it was
    expected = -torch.nn.functional.logsigmoid(0.7 * (u - v)).mean() + nll
    assert objective(logprobs, reference, batch, objective.totals(batch))[0].item() == pytest.approx(expected.item())


def test_wpo_weighs_pairs_by_how_likely_the_policy_writes_them(make_batch, make_logprobs, sums):
    config = PreferenceConfig(loss_type=["dpo", "sft"], loss_weights=[1.0, 0.5], use_weighting=True, beta=0.7)
    objective, batch = PreferenceObjective(config), make_batch(LENGTHS)
    logprobs, reference = make_logprobs(LENGTHS).requires_grad_(), make_logprobs(LENGTHS, seed=1)
    batch.columns[ALIGNED] = make_logprobs(LENGTHS, seed=2)
    chosen, rejected = (total / n for total, n in zip(
        sums(batch.columns[ALIGNED], LENGTHS), torch.tensor(LENGTHS).unbind(1), strict=True))  # fmt: skip
    weights = chosen.exp() * rejected.exp()
    u, v = ratios(logprobs, reference, sums)
    nll = -sums(logprobs, LENGTHS)[0].sum() / sum(c for c, _ in LENGTHS)
    expected = (-torch.nn.functional.logsigmoid(0.7 * (u - v)) * weights).mean() + 0.5 * nll * weights.mean()
    loss, _ = objective(logprobs, reference, batch, objective.totals(batch))
    assert loss.item() == pytest.approx(expected.item())
    grads = [torch.autograd.grad(value, logprobs, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads)


def test_sft_alone_is_the_nll_of_the_chosen_completions(make_batch, make_logprobs, sums):
    objective, batch = PreferenceObjective(PreferenceConfig(loss_type="sft")), make_batch(LENGTHS)
    logprobs = make_logprobs(LENGTHS)
    loss, metrics = objective(logprobs, None, batch, objective.totals(batch))
    assert loss.item() == pytest.approx((-sums(logprobs, LENGTHS)[0].sum() / sum(c for c, _ in LENGTHS)).item())
    assert "rewards/margins" in metrics
