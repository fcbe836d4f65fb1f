"""The objective of losses over labelled rows."""

import pytest
import torch

from fastalign.config.preference import PreferenceConfig
from fastalign.errors import ConfigError
from fastalign.losses import kto
from fastalign.objectives.unpaired import UnpairedObjective

LENGTHS = [(2, 3), (4, 1), (1, 5), (3, 3)]


def test_kto_uses_the_second_completions_as_its_baseline(make_batch, make_logprobs, sums):
    config = PreferenceConfig(loss_type="kto", beta=0.2, desirable_weight=2.0, undesirable_weight=0.5)
    objective, labels = UnpairedObjective(config), [True, False, False, True]
    batch = make_batch(LENGTHS, labels)
    logprobs, reference = make_logprobs(LENGTHS), make_logprobs(LENGTHS, seed=1) - 1.0
    loss, metrics = objective(logprobs, reference, batch, objective.totals(batch))
    (own, other), (ref_own, ref_other) = sums(logprobs, LENGTHS), sums(reference, LENGTHS)
    baseline = (other - ref_other).mean()
    assert baseline > 0
    expected = kto(own, ref_own, torch.tensor(labels), baseline, beta=0.2, weights=(2.0, 0.5)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics["baseline"][0].item() == pytest.approx(baseline.item())
    rewards = 0.2 * (own - ref_own)
    assert metrics["rewards/chosen"][0].item() == pytest.approx((rewards[0] + rewards[3]).item())
    assert metrics["rewards/rejected"][1].item() == 2


def test_bco_shifts_by_the_running_mean_of_either_label(make_batch, make_logprobs):
    objective = UnpairedObjective(PreferenceConfig(loss_type="bco", beta=1.0))
    rewards = {True: [], False: []}
    for seed, labels in enumerate([[True, False], [True, True], [False, True]]):
        lengths = [(2,), (3,)]
        logprobs, reference = make_logprobs(lengths, seed).requires_grad_(), make_logprobs(lengths, seed + 10)
        batch = make_batch(lengths, labels)
        loss, _ = objective(logprobs, reference, batch, objective.totals(batch))
        reward = torch.stack([part.sum() for part in (logprobs - reference).detach().split([2, 3])])
        for label, value in zip(labels, reward, strict=True):
            rewards[label].append(value.item())
        delta = sum(sum(values) / len(values) for values in rewards.values()) / 2
        signs = torch.tensor([1.0 if label else -1.0 for label in labels], dtype=torch.float64)
        expected = -torch.nn.functional.logsigmoid(signs * (reward - delta)).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    before = objective.running.clone()
    with torch.no_grad():  # evaluation looks, and leaves no trace
        objective(logprobs.detach(), reference, batch, objective.totals(batch))
    assert torch.equal(objective.running, before)


def test_apo_zero_is_anchored_at_zero_and_needs_no_second_completions(make_batch, make_logprobs):
    """TRL 1.16's KTOTrainer on two tiny models gives the same float32 number."""
    objective = UnpairedObjective(PreferenceConfig(loss_type="apo_zero_unpaired", beta=0.2, undesirable_weight=0.5))
    lengths, labels = [(2,), (3,), (1,)], torch.tensor([True, False, True])
    logprobs, reference = make_logprobs(lengths), make_logprobs(lengths, seed=1)
    batch = make_batch(lengths, labels.tolist())
    loss, metrics = objective(logprobs, reference, batch, objective.totals(batch))
    ratios = torch.stack([part.sum() for part in (logprobs - reference).split([2, 3, 1])])
    s = torch.sigmoid(0.2 * ratios)
    assert loss.item() == pytest.approx(torch.where(labels, 1 - s, 0.5 * s).mean().item(), rel=1e-12)
    assert metrics["baseline"][0].item() == 0 and not objective.state and not objective.compares_rows


def test_a_loss_over_pairs_is_refused():
    with pytest.raises(
        ConfigError, match="loss_type is \\['dpo'\\]; UnpairedObjective takes one of kto, apo_zero_unpaired, bco"
    ):
        UnpairedObjective(PreferenceConfig(loss_type="dpo"))
