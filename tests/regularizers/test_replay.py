"""Replay: the proportion, the step against plain torch, the same for any cut into micro-batches, resuming."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import transformers as tf
from torch import nn

from fastalign.cli.methods import build_regularizers
from fastalign.errors import ConfigError, DataError
from fastalign.regularizers.replay import Replay, curriculum
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.sft import SFTTrainer

EXACT = 1e-9
TEXT = [{"text": f"Line {i} of an ordinary text" + "." * i} for i in range(11)]
LIVE = {"precompute_ref_log_probs": False}


def gpt2() -> tf.GPT2LMHeadModel:
    config = tf.GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def text_rows():
    return [{"prompt": "ab"[: 1 + i % 2] * (1 + i), "completion": "cde" * (1 + i % 3) + "f" * i} for i in range(8)]


def stream(make_trainer, rows, share, steps, seed=42):
    """True for each replayed row of a stream of alignment rows and replayed rows, and the term."""
    trainer = make_trainer(gpt2(), rows, SFTTrainer, regularizers=[Replay(TEXT, share)], seed=seed)
    (term,) = trainer.terms
    found = []
    for size in steps:
        for count in term.spread(size, term.schedule(0.0)):
            found += [True] * count + [False]
    return found, term


@pytest.mark.parametrize("share", [0.1, 0.2, 1 / 3, 0.137, 0.9])
def test_proportion_is_exact_over_any_window(make_trainer, text_rows, share):
    found, _ = stream(make_trainer, text_rows, share, [8, 3, 1, 8, 8, 5] * 20)
    counts = torch.tensor([0, *found]).cumsum(0)
    for window in (1, 2, 7, 10, 33, 100, len(found)):
        drawn = counts[window:] - counts[:-window]
        # one row either way, and what a share in millionths is off
        assert (drawn - share * window).abs().max() <= 1 + window * 1e-6
    whole = share * len(found)
    assert abs(sum(found) - whole) <= 1 + len(found) * 1e-6


def test_proportion_is_exact_while_the_share_changes(make_trainer, text_rows):
    """Against the sum of the shares at each row of the stream, in integers."""
    (term,) = make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[Replay(TEXT)]).terms
    found, due = [], []
    for step in range(300):
        share = term.schedule(step / 10)  # 40 % to 11 %
        for count in term.spread(7, share):
            found += [1] * count + [0]
            due += [share] * (count + 1)
    counts, sums = (torch.tensor([0, *values]).cumsum(0) for values in (found, due))
    for window in (1, 2, 7, 10, 33, 100, 1000, len(found)):
        drawn, wanted = (total[window:] - total[:-window] for total in (counts, sums))
        assert (drawn * 1_000_000 - wanted).abs().max() < 1_000_000


def test_default_is_the_curriculum():
    assert curriculum(0) == pytest.approx(0.4) and curriculum(10) == pytest.approx(0.3 / math.e + 0.1)
    schedule = Replay(TEXT)._schedule()
    assert schedule(0.0) == 400_000 and schedule(1e9) == 100_000
    same = Replay(TEXT, {"start": 0.4, "end": 0.1, "decay": 10})._schedule()
    assert all(same(epoch) == schedule(epoch) for epoch in (0.0, 0.5, 3.0, 40.0))
    options = {"name": "replay", "text": "a.txt", "share": {"start": 0.5, "end": 0.2, "decay": 1}}
    (built,) = build_regularizers([options])
    assert built._schedule()(1.0) == round((0.3 / math.e + 0.2) * 1e6)  # as a configuration file has it
    assert Replay(TEXT, lambda epoch: 0.2 if epoch < 1 else 0.1)._schedule()(1.5) == 100_000


def test_every_row_of_the_text_comes_once_a_pass_in_an_order_by_seed(make_trainer, text_rows):
    _, term = stream(make_trainer, text_rows, 0.5, [])
    drawn = [str(row["completion_ids"]) for row in term.draw(3 * len(TEXT))]
    passes = [drawn[i : i + len(TEXT)] for i in range(0, len(drawn), len(TEXT))]
    assert len(set(drawn)) == len(TEXT) and all(sorted(p) == sorted(passes[0]) for p in passes)
    assert passes[0] != passes[1]
    _, same = stream(make_trainer, text_rows, 0.5, [])
    _, other = stream(make_trainer, text_rows, 0.5, [], seed=7)
    assert [str(r["completion_ids"]) for r in same.draw(11)] == passes[0]
    assert [str(r["completion_ids"]) for r in other.draw(11)] != passes[0]


def test_step_is_that_of_plain_torch(make_trainer, text_rows, tokenizer):
    """Two replayed rows beside four alignment rows, each as heavy as one of these."""
    model, plain = gpt2(), gpt2()
    trainer = make_trainer(
        model, text_rows[:4], SFTTrainer, regularizers=[Replay(TEXT, 0.4, weight=0.5)], per_device_train_batch_size=4
    )
    replayed = copy.deepcopy(trainer.terms[0]).draw(2)

    def nll(row):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"][0]])
        start = max(1, len(row["prompt_ids"]))
        logits = plain(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        return nn.functional.cross_entropy(logits, ids[0, start:], reduction="none")

    own = torch.cat([nll(row) for row in trainer.train_dataset]).mean()
    loss = own + 0.5 * sum(nll(row).mean() for row in replayed) / 4
    loss.backward()
    trainer.train()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours - (theirs - 0.01 * theirs.grad)).abs().max() < EXACT
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["replay/share"] == pytest.approx(2 / 6)
    assert line["replay/nll"] == pytest.approx(torch.cat([nll(row) for row in replayed]).mean().item(), rel=1e-6)


@pytest.mark.parametrize("kind", [SFTTrainer, PreferenceTrainer])
def test_update_does_not_depend_on_gradient_accumulation(make_trainer, text_rows, pairs, kind):
    options = LIVE if kind is PreferenceTrainer else {}
    results = []
    for size, accumulated in ((8, 1), (2, 4), (1, 8)):
        model = gpt2()
        make_trainer(
            model, pairs if kind is PreferenceTrainer else text_rows, kind, regularizers=[Replay(TEXT, 0.3)],
            max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, **options,
        ).train()  # fmt: skip
        results.append(dict(model.named_parameters()))
    for result in results[1:]:
        assert max((result[n] - results[0][n]).abs().max().item() for n in result) < EXACT


def test_a_run_follows_the_curriculum(make_trainer, text_rows):
    """Four steps an epoch; the remainder in millionths tells one share from another."""
    trainer = make_trainer(
        gpt2(), text_rows, SFTTrainer, regularizers=[Replay(TEXT)], max_steps=12, per_device_train_batch_size=2
    )
    trainer.train()
    drawn = remainder = 0
    for step in range(12):
        share = round(curriculum(step / 4) * 1_000_000)
        for _ in range(2):
            remainder += share
            while remainder >= 1_000_000:
                drawn, remainder = drawn + 1, remainder + share - 1_000_000
    assert trainer.terms[0].state["replay"].tolist() == [drawn, remainder]
    assert drawn > 10


class _StopAt(tf.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


@pytest.mark.parametrize("share", [0.3, "curriculum"])
def test_resumed_run_goes_on_where_it_was(make_trainer, text_rows, tmp_path, share):
    results = []
    for stops in ((None,), (_StopAt(), None)):
        for stop in stops:
            model = gpt2()
            trainer = make_trainer(
                model, text_rows, SFTTrainer, regularizers=[Replay(TEXT, share)],
                output_dir=str(tmp_path / f"{len(stops)}"), max_steps=4, save_strategy="steps",
                save_steps=2, per_device_train_batch_size=3,
                callbacks=[stop] if stop else None,
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=stop is None and len(stops) == 2)
        results.append((model.state_dict(), trainer.terms[0].state["replay"].tolist()))
    (whole, position), (resumed, other) = results
    assert position == other and position[0] > 2
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("regularizer", "error", "said"),
    [
        (Replay([]), DataError, "The replay set is empty"),
        (Replay("nowhere.jsonl"), DataError, "The replay set cannot be used: nowhere.jsonl is not a file"),
        (Replay([{"chosen": "a", "rejected": "b", "prompt": "c"}]), DataError, "not text"),
        (Replay(TEXT * 9, max_length=500), None, ""),
        (Replay([{"text": "x" * 400}], max_length=500), DataError, "128 positions"),
    ],
)
def test_bad_input_is_one_sentence_before_training(make_trainer, text_rows, regularizer, error, said):
    if error is None:
        make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[regularizer])
        return
    with pytest.raises(error) as raised:
        make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[regularizer])
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 0.0}, "share of Replay is 0.0 at epoch 0; it must be between 0 and 1"),
        ({"share": 1.0}, "share of Replay is 1.0"),
        ({"share": "linear"}, "'curriculum'"),
        ({"share": {"start": 0.4}}, "it needs start, end and decay"),
        ({"share": {"start": 0.4, "end": 0.1, "decay": 0}}, "decay of Replay's share is 0"),
        ({"share": {"start": 0.4, "end": 1.5, "decay": 2}}, "share of Replay is 1.5 at epoch inf"),
        ({"weight": -1.0}, "weight of Replay is -1.0"),
    ],
)
def test_bad_options_are_refused_at_construction(options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        Replay(TEXT, **options)
