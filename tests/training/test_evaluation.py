"""Evaluations one after another: each has its own numbers, and rows may be given raw."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from fastalign.errors import ConfigError, DataError

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LIVE = {"precompute_ref_log_probs": False}


def evaluations(trainer, other):
    """The same evaluation before and after another data set was looked at, in every way there is."""
    first = trainer.evaluate()
    trainer.predict(other)
    trainer.evaluate(other, metric_key_prefix="test")
    trainer.evaluate({"a": other, "b": other[:2]})
    return first, trainer.evaluate()


@pytest.mark.parametrize("loss_type", ["simpo", "dpo"])
@pytest.mark.parametrize("lora", [False, True])
def test_evaluations_do_not_mix(make_trainer, tiny_llama, pairs, rows_of_many_lengths, loss_type, lora):
    other = rows_of_many_lengths(5)
    options = {"peft_config": LoraConfig(**LORA)} if lora else LIVE if loss_type == "dpo" else {}
    trainer = make_trainer(
        tiny_llama(), pairs, eval_rows=pairs[:3], loss_type=loss_type, max_steps=2, learning_rate=0.1, **options
    )
    trainer.train()
    first, second = evaluations(trainer, other)
    same = {name for name in first if not any(part in name for part in ("runtime", "per_second"))}
    assert {"eval_loss", "eval_rewards/margins"} <= same
    assert all(second[name] == first[name] for name in same)


def test_other_rows_have_their_own_numbers_under_their_own_prefix(make_trainer, tiny_llama, pairs, tmp_path):
    other, live = pairs[3:], LIVE
    by_hand = make_trainer(tiny_llama(), pairs, eval_rows=other, max_steps=2, learning_rate=0.1, **live)
    trainer = make_trainer(tiny_llama(), pairs, eval_rows=pairs[:3], max_steps=2, learning_rate=0.1, **live)
    for t in (by_hand, trainer):
        t.train()
    expected = by_hand.evaluate()
    found = trainer.evaluate(other, metric_key_prefix="test")
    predicted = trainer.predict(other).metrics
    for name in ("loss", "rewards/margins", "logps/chosen", "kl"):
        assert found[f"test_{name}"] == predicted[f"test_{name}"] == expected[f"eval_{name}"]
    assert not any(name.startswith("eval_") for name in found)
    logged = [line for line in trainer.state.log_history if "test_loss" in line]
    assert [line["test_rewards/margins"] for line in logged] == [found["test_rewards/margins"]]


def test_new_rows_when_all_weights_are_trained_and_the_reference_is_stored(make_trainer, gpt2, pairs):
    trainer = make_trainer(gpt2(dtype=torch.float32), pairs[:4], max_steps=2, learning_rate=0.1)
    assert trainer.evaluate(pairs[4:6])["eval_rewards/margins"] == 0.0
    trainer.train()
    assert trainer.evaluate(pairs[4:6])["eval_rewards/margins"] != 0.0  # stored by the evaluation before
    with pytest.raises(ConfigError, match="have no stored reference log-probs"):
        trainer.evaluate(pairs[6:])


@pytest.mark.parametrize("lora", [False, True])
def test_several_data_sets_by_name_have_their_own_numbers(make_trainer, tiny_llama, pairs, tmp_path, lora):
    options = {"max_steps": 2, "learning_rate": 0.1, "peft_config": LoraConfig(**LORA) if lora else None}
    sets = {"easy": pairs[:3], "hard": pairs[3:]}
    trainer = make_trainer(tiny_llama(), pairs, eval_rows=sets, **options)
    trainer.train()
    found = trainer.evaluate()
    for name, rows in sets.items():
        alone = make_trainer(tiny_llama(), pairs, eval_rows=rows, **options)
        alone.train()
        expected = alone.evaluate()
        for key in ("loss", "rewards/margins", "logps/chosen"):
            assert found[f"eval_{name}_{key}"] == expected[f"eval_{key}"]


def test_a_bad_row_of_a_named_data_set_is_found(make_trainer, tiny_llama, pairs):
    with pytest.raises(DataError, match="eval hard: 1 of 1 rows cannot be used: 1 with identical pair"):
        make_trainer(
            tiny_llama(), pairs, eval_rows={"easy": pairs, "hard": [{"prompt": "a", "chosen": "b", "rejected": "b"}]}
        )
