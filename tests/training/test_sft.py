"""The trainer of supervised fine-tuning."""

from __future__ import annotations

import copy

import pytest
import torch

from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError, DataError
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.sft import SFTTrainer

# In float64 rounding reaches 1e-12 of the largest parameter, and any error of a formula is far above this.
EXACT = 1e-9


def test_one_step_is_the_step_of_plain_torch(
    make_trainer, gpt2, rows_of_many_lengths, by_hand, largest_difference, tokenizer
):
    rows, model = [{"prompt": r["prompt"], "completion": r["rejected"]} for r in rows_of_many_lengths(4)], gpt2()

    def loss(policy, _):
        return -torch.cat([tokens for (tokens,) in policy]).mean()

    expected = by_hand(copy.deepcopy(model), tokenize(rows, tokenizer)[0], loss, 0.01)
    trainer = make_trainer(model, rows, SFTTrainer)
    assert trainer.reference is None
    trainer.train()
    assert largest_difference(gpt2(), expected) > 1e-4
    assert largest_difference(model, expected) < EXACT


def test_pairs_are_refused(make_trainer, tiny_llama, pairs):
    with pytest.raises(DataError, match=r"train: The data set is .*text, messages, or prompt and completion"):
        make_trainer(tiny_llama(), pairs, SFTTrainer)


@pytest.mark.parametrize("trainer", [SFTTrainer, PreferenceTrainer])
def test_options_may_be_left_out_and_rows_may_not(trainer, tiny_llama, tokenizer, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the default run folder would be
    rows = (
        pairs if trainer is PreferenceTrainer else [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs]
    )
    made = trainer(tiny_llama(), train_dataset=rows, processing_class=tokenizer)
    assert made.args.output_dir == "runs/latest" and len(made.train_dataset) == len(pairs)
    with pytest.raises(ConfigError, match="train_dataset is None; pass the rows"):
        trainer(tiny_llama(), processing_class=tokenizer)
