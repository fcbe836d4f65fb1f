import datasets
import pytest
import torch

from fastalign.config.preference import PreferenceConfig
from fastalign.data.batch import Batch
from fastalign.data.collate import with_mismatched
from fastalign.data.packing import pack
from fastalign.errors import DataError
from fastalign.losses import dpo, kto, orpo
from fastalign.objectives.base import Totals
from fastalign.objectives.preference import PreferenceObjective
from fastalign.objectives.sft import SFTObjective
from fastalign.objectives.unpaired import UnpairedObjective

LENGTHS = [(2, 3), (4, 1), (1, 5), (3, 3)]


def make_batch(lengths, desirable=None) -> Batch:
    examples = [{"prompt_ids": [1, 2], "completion_ids": [[3] * n for n in pair]} for pair in lengths]
    return Batch(pack(examples), desirable=None if desirable is None else torch.tensor(desirable))


def make_logprobs(lengths, seed=0) -> torch.Tensor:
    count = sum(map(sum, lengths))
    return -torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.1


def sums(logprobs, lengths):
    """Sums of the first and of the second completions."""
    parts = logprobs.split([n for pair in lengths for n in pair])
    totals = torch.stack([part.sum() for part in parts])
    return totals[0::2], totals[1::2]


def in_parts(objective, lengths, logprobs, reference, cut):
    """The loss of two micro-batches of one accumulated batch."""
    tokens = sum(map(sum, lengths[:cut]))
    parts = [(lengths[:cut], slice(0, tokens)), (lengths[cut:], slice(tokens, None))]
    batches = [make_batch(part) for part, _ in parts]
    totals = Totals(*map(sum, zip(*(objective.totals(batch) for batch in batches), strict=True)))
    return sum(
        objective(logprobs[rows], None if reference is None else reference[rows], batch, totals)[0]
        for batch, (_, rows) in zip(batches, parts, strict=True)
    )


def test_sft_is_the_mean_over_tokens():
    lengths, batch = [(2,), (5,)], make_batch([(2,), (5,)])
    logprobs, objective = make_logprobs(lengths), SFTObjective()
    loss, metrics = objective(logprobs, None, batch, objective.totals(batch))
    assert loss == pytest.approx(-logprobs.mean().item(), rel=1e-12)
    total, count = metrics["lengths/chosen"]
    assert (total.item(), count.item()) == (7, 2)


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
def test_micro_batches_add_up_to_the_whole_batch(options, cut):
    objective = PreferenceObjective(PreferenceConfig(**options))
    logprobs, reference, batch = make_logprobs(LENGTHS), make_logprobs(LENGTHS, seed=1), make_batch(LENGTHS)
    reference = reference if objective.needs_reference else None
    whole, _ = objective(logprobs, reference, batch, objective.totals(batch))
    parts = in_parts(objective, LENGTHS, logprobs, reference, cut)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


def test_mixture_with_nll_is_its_terms():
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


def test_orpo_averages_over_tokens_and_adds_the_nll():
    objective, batch = PreferenceObjective(PreferenceConfig(loss_type="orpo")), make_batch(LENGTHS)
    logprobs = make_logprobs(LENGTHS)
    loss, _ = objective(logprobs, None, batch, objective.totals(batch))
    chosen, rejected = sums(logprobs, LENGTHS)
    lengths = torch.tensor(LENGTHS)
    expected = orpo(chosen / lengths[:, 0], rejected / lengths[:, 1]).mean() - chosen.sum() / lengths[:, 0].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_metrics_are_sums_and_counts_without_a_graph():
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


def test_equal_rewards_are_no_preference():
    objective, batch = PreferenceObjective(PreferenceConfig()), make_batch(LENGTHS)
    logprobs = make_logprobs(LENGTHS)
    _, metrics = objective(logprobs, logprobs, batch, objective.totals(batch))
    assert metrics["rewards/accuracies"][0].item() == 0


def test_kto_uses_the_second_completions_as_its_baseline():
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


def test_kto_takes_its_second_completions_from_other_prompts():
    prompts = [[5], [5], [6], [7], [7], [5]]
    rows = [{"prompt_ids": prompt, "completion_ids": [[i]]} for i, prompt in enumerate(prompts)]
    paired = with_mismatched(datasets.Dataset.from_list(rows))
    assert [row["completion_ids"][1] for row in paired] == [[2], [2], [3], [5], [5], [2]]
    assert [(row["prompt_ids"], row["completion_ids"][0][0]) for row in paired] == [
        (p, i) for i, p in enumerate(prompts)
    ]
    with pytest.raises(DataError, match="other prompts'"):
        with_mismatched(datasets.Dataset.from_list(rows[:2]))


def test_bco_shifts_by_the_running_mean_of_either_label():
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


def test_batch_moves_as_a_whole():
    batch = make_batch(LENGTHS, [True, False, True, False])
    batch.ref_logprobs, batch.prompt_tokens = make_logprobs(LENGTHS), 3
    moved = batch.to("meta", non_blocking=True)
    assert {moved.packed.input_ids.device.type, moved.ref_logprobs.device.type, moved.desirable.device.type} == {"meta"}
    assert moved.prompt_tokens == 3
