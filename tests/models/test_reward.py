"""The padding token of a reward model, and which folders hold one. Scores are held in tests/training/test_reward.py."""

from __future__ import annotations

import copy

import pytest

from fastalign.errors import ModelError
from fastalign.models.reward import choose_padding, is_reward_folder, load_reward_model


def test_the_padding_never_ends_an_answer(tokenizer):
    assert choose_padding(tokenizer, {50}) == tokenizer.pad_token_id
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    other = choose_padding(same, {50})
    assert other not in (same.eos_token_id, 50) and other in same.added_tokens_decoder
    with pytest.raises(ModelError, match="Every special token of the tokenizer ends answers"):
        choose_padding(same, set(same.added_tokens_decoder))


def test_a_language_model_is_no_reward_model(model_dir, tmp_path):
    assert not is_reward_folder(model_dir) and not is_reward_folder(tmp_path)
    with pytest.raises(ModelError, match="holds no reward model"):
        load_reward_model(model_dir)
