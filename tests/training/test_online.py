"""Online training on a tiny model: what a step does is what the formulas say, computed by plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from fastalign.config.online import POLICY, OnlineConfig
from fastalign.errors import ConfigError, DataError, TrainingError
from fastalign.rollout.engine import Rollout
from fastalign.training.online import OnlineTrainer

ROWS = [{"prompt": "Name a colour" + "!" * i, "wanted": 2 + i} for i in range(4)]
ONLINE = {
    "num_generations": 3, "max_completion_length": 5, "per_device_train_batch_size": 2,
    "train_sampling_strategy": "sequential",
}  # fmt: skip


def reward(prompts, completions, wanted, **columns):
    """Answers of the wanted length are best; every argument has one entry per answer."""
    assert len(prompts) == len(completions) == len(wanted) == len(columns["completion_ids"])
    return [-abs(len(ids) - w) + 0.1 * (ids[0] % 7) for ids, w in zip(columns["completion_ids"], wanted, strict=True)]


def online(make_trainer, model, function=reward, rows=ROWS, **options):
    class Trainer(OnlineTrainer):
        def __init__(self, model, args: OnlineConfig | None = None, *others, **given):
            super().__init__(model, args, *others, reward_funcs=function, **given)

    return make_trainer(model, rows, Trainer, **{**ONLINE, **options})


def logprobs_of(model, row, temperature=1.0):
    """The log-probs of each answer by transformers' own forward, in float64."""
    found = []
    for ids in row["completion_ids"]:
        logits = model(input_ids=torch.tensor([row["prompt_ids"] + ids])).logits[0, len(row["prompt_ids"]) - 1 : -1]
        found.append((logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
    return found


def plain_loss(model, batches, name, options, temperature=1.0):
    """The loss of the first inner step by its formula, where every ratio is 1: weights and clipping change nothing."""
    rows = [row for batch in batches for row in batch]
    answers = [
        pair for row in rows for pair in zip(logprobs_of(model, row, temperature), row["advantages"], strict=True)
    ]
    left = torch.tensor([row["left_out"] for row in rows]).sum(0)
    items, tokens = len(answers) + int(left[0]), sum(len(lp) for lp, _ in answers) + int(left[1])
    losses = []
    for lp, a in answers:
        ratio = (lp - lp.detach()).exp()
        if name == "cispo":
            token = -a * lp
        elif name == "sapo":
            tau = 1.0 if a > 0 else 1.05
            token = -a * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        elif name == "rloo":
            losses.append(-a * (lp - lp.detach()).sum().exp() / items)
            continue
        elif name in ("gspo", "luspo"):
            whole = -a * (lp - lp.detach()).mean().exp()
            losses.append(whole * (len(lp) if name == "luspo" else 1) / items)
            continue
        else:
            token = -a * ratio
        divisor = {"grpo": len(lp) * items, "sapo": len(lp) * items}
        divisor["dr_grpo"] = items * options["max_completion_length"]
        losses.append(token.sum() / divisor.get(name, tokens))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("name", POLICY)
def test_a_step_is_the_gradient_of_the_formula(make_trainer, tiny_llama, name):
    """Micro-batches of different sizes, ragged answers, a temperature: against float64 by plain transformers."""
    trainer = online(
        make_trainer, tiny_llama(), loss_type=name, learning_rate=1.0, temperature=0.7, gradient_accumulation_steps=2
    )
    before = copy.deepcopy(trainer.model).double()
    before.forward = type(before).forward.__get__(before)
    torch.manual_seed(0)
    trainer.train()
    loss = plain_loss(before, trainer._held, name, ONLINE, temperature=0.7)
    loss.backward()
    after = dict(trainer.model.named_parameters())
    total = torch.sqrt(sum(p.grad.square().sum() for p in before.parameters()))
    off = torch.sqrt(sum((p.data - after[n].double() - p.grad).square().sum() for n, p in before.named_parameters()))
    assert total > 1e-3 and off / total < 2e-4  # the in-process ratio of sampler and trainer is 1 within 1e-5
    line = trainer.state.log_history[0]
    assert line["importance_ratio/mean"] == 1.0 and line.get("clip_ratio/region_mean", 0.0) == 0.0
    assert line["sampling/sampling_logp_difference/max"] < 1e-4
    assert line["entropy"] > 0 and line["completions/mean_length"] <= 5


def test_groups_without_spread_have_exactly_no_gradient(make_trainer, tiny_llama):
    model = tiny_llama()
    trainer = online(make_trainer, model, lambda completions, **_: [1.0] * len(completions), learning_rate=1.0)
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1.0


class Fixed:
    """An engine that always gives the same answers: what a split into micro-batches must not change."""

    def generate(self, prompts, k, sampling):
        return [
            Rollout(list(p), [[50 + (len(p) + i) % 9] * (1 + (i + n) % 4) for i in range(k)], None, [True] * k)
            for n, p in enumerate(prompts)
        ]

    def sync(self, model):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "luspo", "rloo"])
def test_micro_batches_of_any_size_give_one_update(make_trainer, tiny_llama, name):
    found = []
    for size, steps in ((4, 1), (1, 4), (2, 2)):
        trainer = online(
            make_trainer, tiny_llama(), loss_type=name, learning_rate=0.5, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )  # fmt: skip
        trainer._engine = Fixed()
        trainer.train()
        found.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    for other in found[1:]:
        for n, value in found[0].items():
            torch.testing.assert_close(other[n], value, rtol=0, atol=2e-6)


def test_several_steps_on_the_same_answers(make_trainer, tiny_llama):
    """At the first one the ratio is exactly 1. At the second it is not, and it is that to the first step's model."""
    calls = []

    def counted(completions, **columns):
        calls.append(len(completions))
        return reward(completions=completions, **columns)

    trainer = online(
        make_trainer, tiny_llama(), counted, num_iterations=2, max_steps=4, learning_rate=0.05, logging_steps=1
    )
    trainer.train()
    ratios = [line["importance_ratio/mean"] for line in trainer.state.log_history if "importance_ratio/mean" in line]
    assert len(calls) == 2 and ratios[0] == ratios[2] == 1.0 and ratios[1] != 1.0 and ratios[3] != 1.0


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_has_the_same_bits(make_trainer, tiny_llama, tmp_path, stop):
    """Between the steps on the same answers as well, and with a controlled divergence."""

    def run(**options):
        trainer = online(
            make_trainer, tiny_llama(), num_iterations=2, max_steps=4, learning_rate=0.05, optim="adamw_torch",
            save_strategy="steps", save_steps=1, overwrite_output_dir=False, output_dir=str(tmp_path / "run"),
            peft_config=LoraConfig(r=2, target_modules="all-linear"), beta=0.1, kl_target=1e-4,
            gradient_accumulation_steps=2, per_device_train_batch_size=1,
        )  # fmt: skip
        trainer.train(**options)
        kept = [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gb")}
                for line in trainer.state.log_history if "loss" in line]  # fmt: skip
        return kept, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    whole, weights = run()
    again, same = run(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert again == whole and all(torch.equal(weights[n], same[n]) for n in weights)


def test_the_divergence_is_exact_and_its_weight_follows_the_target(make_trainer, tiny_llama):
    trainer = online(
        make_trainer, tiny_llama(), beta=0.2, kl_target=1e-6, max_steps=4, learning_rate=0.1, logging_steps=1
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "kl/beta" in line]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6) and lines[0]["kl/k1"] == 0.0  # the start is the start
    assert lines[1]["kl"] > 1e-5 and lines[1]["kl/k3"] > 0
    # Far above the target from the second step on: beta grows by a half after it, at the third.
    assert [line["kl/beta"] for line in lines][:2] == pytest.approx([0.2, 0.1])  # a divergence of 0 is below the target
    assert lines[2]["kl/beta"] == pytest.approx(0.15) and lines[3]["kl/beta"] == pytest.approx(0.225)


def test_answers_that_cannot_be_scored_are_left_out_and_counted(make_trainer, tiny_llama):
    def partly(completions, **columns):
        values = reward(completions=completions, **columns)
        return [None if i % 3 == 0 else value for i, value in enumerate(values)]

    trainer = online(make_trainer, tiny_llama(), partly)
    trainer.train()
    assert all(len(row["completion_ids"]) == 2 for batch in trainer._held for row in batch)
    assert trainer.state.log_history[0]["rewards/unscored"] == pytest.approx(1 / 3)


def test_held_out_prompts_are_answered_and_judged(make_trainer, tiny_llama):
    trainer = online(make_trainer, tiny_llama(), eval_rows=ROWS[:3])
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(-found["eval_reward"]) and found["eval_rewards/reward/mean"] <= 0.6


def test_chats_reach_the_reward_as_chats(make_trainer, tiny_llama):
    seen = []

    def look(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return list(range(len(prompts)))

    rows = [{"prompt": [{"role": "user", "content": f"a{i}"}]} for i in range(2)]
    online(make_trainer, tiny_llama(), look, rows).train()
    assert seen[0][0] == rows[0]["prompt"] and seen[0][1][0]["role"] == "assistant" and len(seen) == 6


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda **_: 1 / 0, "raised ZeroDivisionError"),
        (lambda completions, **_: [1.0], "returned 1 values for 6 completions"),
        (lambda completions, **_: [float("nan")] * 6, "gave nan for completion 0"),
        (lambda completions, **_: ["good"] * 6, "gave 'good' for completion 0"),
        (lambda completions, **_: [None] * 6, "gave None for all 6 completions"),
        (lambda completions, **_: None, "returned a NoneType"),
    ],
)
def test_a_reward_that_cannot_be_used_stops_with_one_sentence(make_trainer, tiny_llama, function, message):
    with pytest.raises(TrainingError, match=message):
        online(make_trainer, tiny_llama(), function).train()


def test_what_is_refused_before_training(make_trainer, tiny_llama):
    with pytest.raises(ConfigError, match="num_generations is 1"):
        online(make_trainer, tiny_llama(), num_generations=1)
    with pytest.raises(DataError, match="no column 'prompt'"):
        online(make_trainer, tiny_llama(), rows=[{"question": "a"}])
    with pytest.raises(ConfigError, match="dropout"):
        online(make_trainer, tiny_llama(), peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.1))
    with pytest.raises(DataError, match="answers up to 250, but the model has 256 positions"):
        online(make_trainer, tiny_llama(), max_completion_length=250)
    with pytest.raises(ConfigError, match="reward_funcs is empty"):
        make_trainer(tiny_llama(), ROWS, OnlineTrainer, **ONLINE)
    with pytest.raises(ConfigError, match="reward_weights is"):
        online(make_trainer, tiny_llama(), reward_weights=[1.0, 2.0])
    with pytest.raises(DataError, match=r"more than 5 tokens.*max_completion_length"):
        online(make_trainer, tiny_llama(), max_length=10)
