"""The trainer of supervised fine-tuning."""

from __future__ import annotations

import copy

import pytest
import torch

from fastalign.config.sft import SFTConfig
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


def test_formatting_func_makes_the_texts(tiny_llama, pairs, tokenizer, tmp_path):
    def join(row):
        return f"Q: {row['prompt']} A: {row['chosen']}"

    def make(function):
        args = SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True)
        return SFTTrainer(tiny_llama(), args, pairs, processing_class=tokenizer, formatting_func=function)

    trainer = make(join)
    expected = tokenize([{"text": join(row)} for row in pairs], tokenizer)[0]
    assert [dict(row) for row in trainer.train_dataset] == [dict(row) for row in expected]
    with pytest.raises(DataError, match=r"formatting_func made .* of row 1; it must return one string"):
        make(lambda row: [row["prompt"]])


def test_every_token_is_scored_where_the_options_say_so(make_trainer, tiny_llama, pairs):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    parts = [
        make_trainer(tiny_llama(), rows, SFTTrainer, completion_only_loss=alone).preflight for alone in (True, False)
    ]
    assert parts[1].scored_tokens > parts[0].scored_tokens
    assert parts[1].scored_fraction == pytest.approx(1, abs=0.2), "all but the first token of each row"
