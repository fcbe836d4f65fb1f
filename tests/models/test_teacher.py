"""Teachers: what is stored of them, and which are refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.models.loading import load_model
from fastalign.models.teacher import Teacher, TopK, store_topk
from fastalign.regularizers.distillation import Distillation
from fastalign.training.sft import SFTTrainer


def gpt2(*, seed=0, vocab=259) -> tf.GPT2LMHeadModel:
    config = tf.GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, bos_token_id=None,
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


def test_stored_entries_are_the_largest_at_their_temperature(tokenizer, pairs, tmp_path):
    rows = tokenize(pairs, tokenizer)[0]
    model = gpt2(seed=1)
    path = store_topk(Teacher(copy.deepcopy(model), tokenizer), rows, 5, 2.0, tmp_path)
    before = path.stat().st_mtime_ns
    assert store_topk(Teacher(copy.deepcopy(model), tokenizer), rows, 5, 2.0, tmp_path) == path
    assert path.stat().st_mtime_ns == before
    assert not [p for p in path.parent.iterdir() if p != path]
    stored, row = TopK(path), rows[5]
    indices, logprobs = stored([row])
    expected = []
    for completion in row["completion_ids"]:
        single = {"prompt_ids": row["prompt_ids"], "completion_ids": [completion]}
        expected.append((completion_logits(model, single) / 2.0).log_softmax(-1).topk(5))
    assert torch.equal(indices, torch.cat([e.indices for e in expected]))
    assert torch.allclose(logprobs.double(), torch.cat([e.values for e in expected]), atol=1e-5)


def other_tokenizer(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    return other


def test_teachers_with_another_tokenizer_are_refused(make_trainer, tokenizer, tiny_llama, text_rows, tmp_path):
    folder = tmp_path / "teacher"
    tiny_llama(vocab_size=260).save_pretrained(folder)
    other_tokenizer(tokenizer).save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"different tokenizers: 1 of 259 tokens differ \('<new>' is unknown to the st"
    ):
        make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[Distillation(str(folder))])
    with pytest.raises(ModelError, match=r"knows 200 tokens and the student's tokenizer has 259"):
        make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[Distillation(gpt2(vocab=200))])
    with pytest.raises(ModelError, match="different tokenizers: 1 of 259 tokens differ"):  # loaded, and large enough
        make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[Distillation(load_model(folder))])
    rows = tokenize(text_rows, tokenizer)[0]
    path = store_topk(Teacher(gpt2(vocab=260), other_tokenizer(tokenizer)), rows, 3, 1.0, tmp_path)
    with pytest.raises(ModelError, match="stored with another tokenizer"):
        make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[Distillation(str(path))])


def test_stored_teachers_that_do_not_fit_are_refused(make_trainer, tokenizer, text_rows, tmp_path):
    path = store_topk(Teacher(gpt2(), tokenizer), tokenize(text_rows[:5], tokenizer)[0], 3, 1.0, tmp_path)
    for regularizer, error, said in (
        (Distillation(str(path)), DataError, "lack 3 of 8 training rows"),
        (Distillation(str(path), temperature=2.0), ConfigError, "are at temperature 1.0, but Distillation's is 2"),
        (Distillation(str(tmp_path / "nowhere.safetensors")), DataError, "cannot be read"),
    ):
        with pytest.raises(error) as raised:
            make_trainer(gpt2(), text_rows, SFTTrainer, regularizers=[regularizer])
        assert said in str(raised.value) and "\n" not in str(raised.value)
