"""Distillation against plain torch in float64, stored teachers, and teachers that do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError
from fastalign.losses.distillation import distillation_loss
from fastalign.reference import logits_divergence
from fastalign.regularizers.distillation import Distillation
from fastalign.training.preference import PreferenceTrainer
from fastalign.training.sft import SFTTrainer

EXACT = 1e-9
LIVE = {"precompute_ref_log_probs": False}


def gpt2(*, seed=0, width=32, vocab=259) -> tf.GPT2LMHeadModel:
    config = tf.GPT2Config(
        vocab_size=vocab, n_embd=width, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tf.GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def text_rows():
    return [{"prompt": "ab"[: 1 + i % 2] * (1 + i), "completion": "cde" * (1 + i % 3) + "f" * i} for i in range(8)]


def completion_logits(model: nn.Module, row: dict):
    ids, start = row["prompt_ids"] + row["completion_ids"][0], len(row["prompt_ids"])
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]


def by_hand(student, teacher, rows, *, weight, temperature, divergence="forward_kl", steps=2, learning_rate=0.01, **kw):
    """Parameters after SGD on `a NLL + (1 - a) tau^2 D`, D over the tokenizer's 259 entries."""
    for _ in range(steps):
        logits = torch.cat([completion_logits(student, row) for row in rows])
        with torch.no_grad():
            theirs = torch.cat([completion_logits(teacher, row) for row in rows])
        targets = torch.tensor([token for row in rows for token in row["completion_ids"][0]])
        sides = logits[:, :259], theirs[:, :259]
        distance = logits_divergence(*sides, divergence=divergence, temperature=temperature, **kw).mean()
        nll = nn.functional.cross_entropy(logits, targets)
        student.zero_grad()
        (weight * nll + (1 - weight) * temperature**2 * distance).backward()
        with torch.no_grad():
            for p in student.parameters():
                p.sub_(learning_rate * p.grad)
    return {name: p.detach() for name, p in student.named_parameters()}


def largest_difference(model: nn.Module, expected) -> float:
    found = dict(model.named_parameters())
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


def test_the_mixture_is_the_formula():
    loss = distillation_loss(torch.tensor(3.0), torch.tensor(0.5), weight=0.25, temperature=2.0)
    assert loss.item() == 0.25 * 3.0 + 0.75 * 4.0 * 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"weight": 0.3, "temperature": 2.0},
        {"weight": 0.0, "temperature": 1.0, "divergence": "reverse_kl"},
        {"weight": 0.5, "temperature": 1.5, "divergence": "jsd", "jsd_beta": 0.2},
    ],
)
@pytest.mark.parametrize("teacher", ["another", "wider, padded vocabulary", "start"])
@pytest.mark.parametrize("vocab", [259, 262])  # padded beyond the tokenizer
def test_steps_are_those_of_plain_torch(make_trainer, tokenizer, text_rows, options, teacher, vocab):
    student, rows = gpt2(vocab=vocab), text_rows[:4]
    made = {
        "another": gpt2(seed=1), "wider, padded vocabulary": gpt2(seed=2, width=48, vocab=264),
        "start": gpt2(vocab=vocab),
    }  # fmt: skip
    expected = by_hand(copy.deepcopy(student), made[teacher], tokenize(rows, tokenizer)[0], **options)
    source = "start" if teacher == "start" else made[teacher]
    make_trainer(student, rows, SFTTrainer, regularizers=[Distillation(source, **options)], max_steps=2).train()
    if teacher != "start" or options["weight"]:  # from the start there is nothing to learn
        assert largest_difference(gpt2(vocab=vocab), expected) > 1e-5
    assert largest_difference(student, expected) < EXACT


@pytest.mark.parametrize("vocab", [259, 262])
def test_a_stored_teacher_with_the_whole_vocabulary_is_the_live_one(
    make_trainer, tokenizer, text_rows, tmp_path, vocab
):
    rows, student = text_rows[:4], gpt2(vocab=vocab)
    made = gpt2(seed=1, vocab=vocab + 2)
    expected = by_hand(copy.deepcopy(student), made, tokenize(rows, tokenizer)[0], weight=0.3, temperature=2.0)
    regularizer = Distillation(made, 0.3, 2.0, top_k=259, cache_dir=str(tmp_path))
    make_trainer(student, rows, SFTTrainer, regularizers=[regularizer], max_steps=2).train()
    assert largest_difference(student, expected) < 1e-6  # stored in float32
    (path,) = (tmp_path / "teachers").iterdir()
    again = gpt2(vocab=vocab)
    make_trainer(again, rows, SFTTrainer, regularizers=[Distillation(str(path), 0.3, 2.0)], max_steps=2).train()
    assert largest_difference(again, dict(student.named_parameters())) == 0.0


def test_update_does_not_depend_on_gradient_accumulation(make_trainer, pairs, tmp_path):
    for regularizer in (
        lambda: Distillation("start", 0.4, 2.0),
        lambda: Distillation(gpt2(seed=1), 0.4),
        lambda: Distillation(gpt2(seed=1), 0.4, top_k=7, cache_dir=str(tmp_path)),
    ):
        results = []
        for size, accumulated in ((8, 1), (1, 8)):
            model = gpt2()
            make_trainer(
                model, pairs, PreferenceTrainer, regularizers=[regularizer()], max_steps=2,
                per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, **LIVE,
            ).train()  # fmt: skip
            results.append(dict(model.named_parameters()))
        assert max((results[0][n] - results[1][n]).abs().max().item() for n in results[0]) < EXACT


# Bad input


def test_other_bad_input_is_one_sentence(make_trainer, text_rows):
    model = gpt2()
    for regularizer, said in (
        (lambda: Distillation("start", 1.0), "weight of Distillation is 1.0"),
        (lambda: Distillation("start", temperature=0.0), "temperature of Distillation is 0.0"),
        (lambda: Distillation("start", divergence="kl"), "forward_kl"),
        (lambda: Distillation("start", top_k=5), "leave it out with teacher='start'"),
        (lambda: Distillation(gpt2(), top_k=500), "vocabulary has 259 entries"),
        (lambda: Distillation(model), "set teacher='start'"),
    ):
        with pytest.raises(ConfigError) as raised:
            make_trainer(model, text_rows, SFTTrainer, regularizers=[regularizer()])
        assert said in str(raised.value) and "\n" not in str(raised.value)
