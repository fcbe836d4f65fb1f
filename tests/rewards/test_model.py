"""A reward model scores tokenised rows in any batch, and is a reward function in TRL's form."""

from __future__ import annotations

import pytest
import torch

from fastalign.data.tokenization import tokenize
from fastalign.errors import InputError
from fastalign.models.reward import with_score_layer
from fastalign.rewards.model import RewardModel


@pytest.fixture(scope="module")
def reward(tiny_llama, tokenizer):
    return RewardModel(with_score_layer(tiny_llama(), seed=1), tokenizer)


def test_scores_are_those_of_each_sequence_alone(reward, tokenizer, pairs):
    rows, _ = tokenize(pairs, tokenizer)
    with torch.no_grad():
        for row, scores in zip(rows, reward.score(rows), strict=True):
            for ids, score in zip(row["completion_ids"], scores, strict=True):
                own = reward.model(input_ids=torch.tensor([row["prompt_ids"] + ids])).logits.item()
                assert score == pytest.approx(own, abs=1e-5)


def test_it_is_called_as_trl_calls_a_reward_function(reward, tokenizer, pairs):
    prompts, completions = [row["prompt"] for row in pairs], [row["chosen"] for row in pairs]
    completions[2] = "  "
    found = reward(prompts, completions, completion_ids=[], trainer_state=None)
    assert found[2] is None and all(isinstance(score, float) for i, score in enumerate(found) if i != 2)
    chats = [[{"role": "user", "content": text}] for text in prompts]
    answers = [[{"role": "assistant", "content": text}] for text in completions]
    of_chats = reward(chats, answers)
    assert of_chats[2] is None and of_chats[0] != found[0]
    with pytest.raises(InputError, match="8 prompts and 7 completions"):
        reward(prompts, completions[1:])
