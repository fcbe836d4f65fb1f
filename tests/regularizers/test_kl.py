"""The KL to the start against plain torch in float64, over the logits of the stock model."""

from __future__ import annotations

import copy

import pytest
import torch

from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError
from fastalign.reference import logits_divergence
from fastalign.regularizers.kl import KLToStart
from fastalign.training.sft import SFTTrainer

EXACT = 1e-9
LIVE = {"precompute_ref_log_probs": False}


@pytest.mark.parametrize(
    ("divergence", "options"), [("reverse_kl", {}), ("forward_kl", {}), ("jsd", {"jsd_beta": 0.3})]
)
def test_steps_are_those_of_plain_torch(
    make_trainer, tokenizer, text_rows, gpt2, sft_by_hand, largest_difference, divergence, options
):
    def penalty(model, start, now, then):
        return 2.0 * logits_divergence(now, then, divergence=divergence, **options).mean()

    model, rows = gpt2(), text_rows[:4]
    tokens = tokenize(rows, tokenizer)[0]
    expected = sft_by_hand(copy.deepcopy(model), gpt2(), tokens, penalty)
    without = sft_by_hand(copy.deepcopy(model), gpt2(), tokens, lambda *_: 0.0)
    regularizer = KLToStart(2.0, divergence, **options)
    make_trainer(model, rows, SFTTrainer, regularizers=[regularizer], max_steps=3, num_train_epochs=3).train()
    assert largest_difference(model, without) > 1e-5  # so that the next line says something
    assert largest_difference(model, expected) < EXACT


def test_a_moved_reference_is_not_the_start(make_trainer, pairs, gpt2):
    """KL is to where training began, though TR-DPO's reference has moved on."""
    trainer = make_trainer(
        gpt2(), pairs, regularizers=[KLToStart(1.0)], max_steps=2, sync_ref_model=True, ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0, **LIVE,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[1]["kl_to_start"] > 1e-6
    start = dict(gpt2().named_parameters())
    kept = zip(trainer.keep_start().parameters, trainer.keep_start().values, strict=True)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    assert all(torch.equal(start[names[id(p)]], value) for p, value in kept)


def test_an_unknown_divergence_is_refused_before_training(make_trainer, text_rows, gpt2):
    with pytest.raises(ConfigError, match="did you mean 'reverse_kl'"):
        make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[KLToStart(1.0, "reverse")])
