"""`evaluate` over items of every kind, with a model whose answers are known."""

from __future__ import annotations

import pytest

from fastalign.errors import ConfigError, DataError
from fastalign.evaluation import run
from fastalign.evaluation.answers import Answers
from fastalign.evaluation.run import evaluate, summarise_items
from fastalign.evaluation.suite import Suite

ROWS = [
    {"prompt": "1 + 1", "answer": "2", "category": "sums"},
    {"prompt": "1 + 2", "answer": "3", "category": "sums"},
    {"prompt": "Name a colour", "choices": ["red", "blue"], "label": 0},
    {"prompt": "Say it shortly", "checks": {"words_at_most": 3, "includes": "red"}},
    {"prompt": "Write f", "tests": "assert f() == 1"},
]
WRITTEN = ["It is 2", "It is 4", "so very red it is", "```python\ndef f():\n    return 1\n```"]


@pytest.fixture
def model(tiny_llama, monkeypatch):
    """A model whose written answers are WRITTEN."""

    def answer(model, tokenizer, prompts, **options):
        return Answers(WRITTEN, [1] * len(prompts), [True] * len(prompts))

    monkeypatch.setattr(run, "answer", answer)
    return tiny_llama().eval()


def test_every_kind_of_item(model, tokenizer):
    found = evaluate(model, [Suite.from_rows("mixed", ROWS)], tokenizer, max_new_tokens=8)
    items = found["items"]
    assert [item["kind"] for item in items] == ["answer", "answer", "choices", "checks", "tests"]
    assert [item["correct"] for item in items if item["kind"] != "choices"] == [True, False, False, True]
    assert items[2]["correct"] == (items[2]["chosen"] == 0) and len(items[2]["logprobs"]) == 2
    assert items[3]["failed"] == ["words_at_most"]
    assert found["categories"]["mixed/sums"]["accuracy"] == 0.5
    assert found["suites"]["mixed"]["chance"] == pytest.approx(0.1)
    assert found["suites"]["mixed"]["low"] < found["suites"]["mixed"]["accuracy"] < found["suites"]["mixed"]["high"]


def test_written_answers_come_from_the_model(tiny_llama, tokenizer):
    suite = Suite.from_rows("s", ROWS[:1])
    found = evaluate(tiny_llama().eval(), [suite], tokenizer, max_new_tokens=4)
    again = evaluate(tiny_llama().eval(), [suite], tokenizer, max_new_tokens=4, temperature=1.0)
    assert found["items"][0]["tokens"] <= 4
    assert found["items"][0]["answer"] != again["items"][0]["answer"]


def test_a_summary_counts_each_category_by_its_suite():
    rows = [{"suite": s, "category": "c", "correct": s == "a"} for s in "ab"]
    assert {name: part["correct"] for name, part in summarise_items(rows)["categories"].items()} == {"a/c": 1, "b/c": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [({"limit": 0}, "limit is 0"), ({"temperature": -1}, "temperature is -1"), ({"max_new_tokens": 250}, "positions")],
)
def test_what_is_refused(tiny_llama, tokenizer, options, said):
    with pytest.raises((ConfigError, DataError), match=said):
        evaluate(tiny_llama(), [Suite.from_rows("s", ROWS[:1])], tokenizer, **options)


def test_two_suites_of_one_name(tiny_llama, tokenizer):
    with pytest.raises(DataError, match="each name once"):
        evaluate(tiny_llama(), ["knowledge", "knowledge"], tokenizer)
    with pytest.raises(ConfigError, match="tokenizer is None"):
        evaluate(tiny_llama(), [Suite.from_rows("s", ROWS[:1])])
