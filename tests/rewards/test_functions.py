"""Reward functions are loaded by name, weighted, and may leave answers unscored."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.errors import ConfigError, ModelError
from fastalign.rewards.functions import Rewards, load_reward


def length(completions, **_):
    return [float(len(text)) for text in completions]


def known(completions, **_):
    return torch.tensor([[1.0], [2.0]]) if completions[0] else [None, 2.0]


def test_a_function_by_its_module_or_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def best(completions, **_):\n    return [7] * len(completions)\n")
    assert load_reward(f"{path}:best")(completions=["a"]) == [7]
    assert load_reward("fastalign.recipes.sums.reward:right_sum").__name__ == "right_sum"
    for source, message in (
        (f"{path}:worst", "has no function 'worst'"), ("no.such.module:f", "cannot be imported"),
        (f"{tmp_path / 'none.py'}:f", "cannot be imported"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            load_reward(source)
    with pytest.raises(ModelError, match="holds no reward model"):
        load_reward(str(tmp_path))


def test_rewards_are_weighted_and_missing_ones_left_out():
    rewards = Rewards([length, known], [0.5, 2.0])
    assert rewards.names == ["length", "known"]
    found = rewards(["p", "p"], ["abc", "d"])
    assert rewards.total(found).tolist() == [0.5 * 3 + 2 * 1, 0.5 * 1 + 2 * 2]
    missing = rewards(["p", "p"], ["", "d"])
    assert math.isnan(missing[0, 1]) and rewards.total(missing).tolist() == [0.0, 4.5]
    assert math.isnan(Rewards([known]).total(missing[:, 1:])[0])
    assert Rewards([length, length]).names == ["length_0", "length_1"]


def test_the_reward_of_the_sums():
    right = load_reward("fastalign.recipes.sums.reward:right_sum")
    texts = ["3 + 4 = 7", "It is 8.", "seven", "7 apples, 9 pears"]
    assert right(prompts=[], completions=texts, answer=["7"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert right(prompts=[], completions=[[{"role": "assistant", "content": "7"}]], answer=["7"]) == [1.0]
