"""A small model in float64, and steps of SGD written out in plain torch, for the tests of all regularisers."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import Tensor, nn


def _gpt2() -> tf.GPT2LMHeadModel:
    """A model that computes in float64 throughout, with a tied head."""
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


def _random_fisher(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}


def _completion_logits(model: nn.Module, row: dict) -> Tensor:
    """The logits that predict the completion's tokens, of the stock model."""
    ids, start = row["prompt_ids"] + row["completion_ids"][0], len(row["prompt_ids"])
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]


def _sft_by_hand(model, start, rows, penalty, *, steps=3, learning_rate=0.01):
    """Parameters after some steps of SGD on the mean NLL plus `penalty(model, start, logits now, logits then)`."""
    for _ in range(steps):
        logits = torch.cat([_completion_logits(model, row) for row in rows])
        with torch.no_grad():
            then = torch.cat([_completion_logits(start, row) for row in rows])
        targets = torch.tensor([token for row in rows for token in row["completion_ids"][0]])
        loss = nn.functional.cross_entropy(logits, targets) + penalty(model, start, logits, then)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.sub_(learning_rate * p.grad)
    return {name: p.detach() for name, p in model.named_parameters()}


def _largest_difference(model: nn.Module, expected: dict[str, Tensor]) -> float:
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


@pytest.fixture(scope="session")
def gpt2():
    return _gpt2


@pytest.fixture(scope="session")
def random_fisher():
    return _random_fisher


@pytest.fixture(scope="session")
def sft_by_hand():
    return _sft_by_hand


@pytest.fixture(scope="session")
def largest_difference():
    return _largest_difference
