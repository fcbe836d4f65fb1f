"""Evaluation mode is left as it was entered, module by module."""

import pytest
import torch
from torch import nn

from fastalign.models.modes import evaluation_mode
from fastalign.rollout import generate


def test_a_block_kept_in_evaluation_mode_stays_there():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    with evaluation_mode(model):
        assert not model[0].training
    assert model.training and model[0].training and not model[1].training


def test_an_error_does_not_leave_the_model_in_evaluation_mode():
    model = nn.Linear(2, 2).train()
    with pytest.raises(ValueError, match="on the way"), evaluation_mode(model):
        raise ValueError("on the way")
    assert model.training


def test_generation_that_fails_gives_the_mode_back(tiny_llama, tokenizer):
    model = tiny_llama().train()
    frozen = model.model.layers[0].eval()
    with pytest.raises(IndexError):
        generate(model, tokenizer, [[1, 10**6]], max_new_tokens=2)
    assert model.training and not frozen.training
    with torch.no_grad():
        generate(model, tokenizer, [[1, 2]], max_new_tokens=2)
    assert model.training and not frozen.training
