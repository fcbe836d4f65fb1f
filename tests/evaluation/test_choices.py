"""Log-probabilities of options against a plain computation of each option by itself."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import DataError
from fastalign.evaluation.choices import encode_choices, score_choices
from fastalign.evaluation.suite import Suite
from fastalign.models.scoring import prepare

ROWS = [
    {"prompt": "Name a colour:", "choices": ["red", "dark blue", "x"], "label": 0},
    {"prompt": "Two spaces  ", "choices": ["one", "two"], "label": 1},
    {"prompt": "中文", "choices": ["好", "不好"], "label": 1},
    {"messages": [{"role": "user", "content": "Hi"}], "choices": ["Hello", "Go away"], "label": 0},
]


def plain(model, prompt, option) -> float:
    """The log-probability of an option by the model's own logits."""
    ids = torch.tensor([[*prompt, *option]])
    with torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return float(logprobs[range(len(prompt) - 1, ids.shape[1] - 1), list(option)].sum())


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_log_probs_are_those_of_each_option_by_itself(tiny_llama, tokenizer, layout):
    model = tiny_llama().eval()
    items = Suite.from_rows("s", ROWS).items
    rows = encode_choices(items, tokenizer)
    expected = [[plain(model, row["prompt_ids"], ids) for ids in row["completion_ids"]] for row in rows]
    assert prepare(model) == "shared"
    found = score_choices(model, tokenizer, layout, items)
    for scores, logprobs, row in zip(found, expected, rows, strict=True):
        assert scores.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert scores.tokens.tolist() == [len(ids) for ids in row["completion_ids"]]


def test_how_prompt_and_option_are_joined(tokenizer):
    rows = encode_choices(Suite.from_rows("s", ROWS).items, tokenizer)
    texts = [[tokenizer.decode(row["prompt_ids"] + ids) for ids in row["completion_ids"]] for row in rows]
    assert texts[0] == ["Name a colour: red", "Name a colour: dark blue", "Name a colour: x"]
    assert texts[1][0] == "Two spaces  one"
    assert tokenizer.decode(rows[1]["completion_ids"][0]) == "  one"
    assert texts[2] == ["中文好", "中文不好"]
    assert texts[3][0].endswith("<|im_start|>assistant\nHello")


def test_what_cannot_be_scored(tiny_llama, tokenizer):
    model = tiny_llama().eval()
    layout = prepare(model)
    long = Suite.from_rows("s", [{"id": "long", "prompt": "x" * 300, "choices": ["a", "b"], "label": 0}])
    with pytest.raises(DataError, match="Item long has 302 tokens with its longest option, and the model has 256 pos"):
        score_choices(model, tokenizer, layout, long.items)
    same = Suite.from_rows("s", [{"id": "same", "prompt": "x", "choices": ["a", " a"], "label": 0}])
    with pytest.raises(DataError, match="Item same has two options of the same tokens"):
        score_choices(model, tokenizer, layout, same.items)
