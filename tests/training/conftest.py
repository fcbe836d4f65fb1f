"""Shared by the trainers' tests: a model in float64, rows of many lengths, and log-probs and steps of plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="session")
def gpt2():
    """A function that makes a model which computes in float64 throughout. Those with RMSNorm do that in float32."""

    import transformers as tf

    def make(*, tied=True, dtype=torch.float64, seed=0) -> tf.GPT2LMHeadModel:
        config = tf.GPT2Config(
            vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, bos_token_id=None,
            eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return tf.GPT2LMHeadModel(config).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def rows_of_many_lengths():
    """A function from a count to that many rows of preferences."""

    def make(count: int) -> list[dict]:
        generator = torch.Generator().manual_seed(1)

        def text(longest: int) -> str:
            length = int(torch.randint(1, longest + 1, (), generator=generator))
            return "".join(chr(97 + int(i)) for i in torch.randint(26, (length,), generator=generator))

        # An upper-case letter keeps chosen and rejected apart.
        return [{"prompt": text(14), "chosen": "C" + text(12), "rejected": "R" + text(20)} for _ in range(count)]

    return make


@pytest.fixture(scope="session")
def logps():
    """f(model, row): per completion of a tokenised row, its tokens' log-probs from the stock model's logits, each
    sequence alone."""

    def score(model: nn.Module, row: dict) -> list[Tensor]:
        values = []
        for completion in row["completion_ids"]:
            ids, start = row["prompt_ids"] + completion, len(row["prompt_ids"])
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            values.append(torch.stack([wide[t - 1, ids[t]] for t in range(start, len(ids))]))
        return values

    return score


@pytest.fixture(scope="session")
def by_hand(logps):
    """f(model, rows, loss, learning_rate): the parameters after one step of SGD on `loss(policy, reference)`, both a
    list of pairs of token log-probs."""

    def step(model: nn.Module, rows, loss, learning_rate: float) -> dict[str, Tensor]:
        with torch.no_grad():
            reference = [logps(model, row) for row in rows]
        loss([logps(model, row) for row in rows], reference).backward()
        return {
            name: (p - learning_rate * p.grad if p.grad is not None else p).detach()
            for name, p in model.named_parameters()
        }

    return step


@pytest.fixture(scope="session")
def largest_difference():
    """f(model, parameters): how far the model's parameters are from others of the same names."""

    def difference(model: nn.Module, expected: dict[str, Tensor]) -> float:
        found = dict(model.named_parameters())
        assert found.keys() == expected.keys()
        return max((found[name] - value).abs().max().item() for name, value in expected.items())

    return difference
