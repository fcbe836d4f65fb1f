"""The key of stored tokens: another one for everything that decides on them."""

import json

import datasets
import pytest

from fastalign.data import token_keys
from fastalign.data.loading import Source
from fastalign.data.token_keys import token_key

PAIRS = [{"prompt": f"the {n}", "chosen": f" dog {n}", "rejected": " fox"} for n in range(6)]
OPTIONS = {"max_length": None, "wanted": "pairs"}


@pytest.fixture(autouse=True)
def _few_rows_are_many(monkeypatch):
    monkeypatch.setattr(token_keys, "MIN_ROWS", 6)
    monkeypatch.setattr(token_keys, "MIN_BYTES", 100)


def test_rows_tokenizer_and_options_are_in_the_key(tokenizer, byte_level, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    seen = set()

    def new(rows=path, tokenizer=tokenizer, **options):
        key = token_key(rows, tokenizer, OPTIONS | options)
        assert key is not None
        before = len(seen)
        seen.add(key)
        return len(seen) > before

    assert new() and not new() and not new(Source(str(path)))
    assert new(max_length=100) and new(wanted=None)
    assert new(Source(str(path), {"prompt": "chosen", "chosen": "prompt"}))
    assert new([{"path": str(path), "weight": 2}]) and new([str(path), str(path)])
    other = byte_level()
    assert new(tokenizer=other)
    other.chat_template = "{{ messages }}"
    assert new(tokenizer=other) and not new(tokenizer=other)
    other.eos_token = "<s>"
    assert new(tokenizer=other)
    other.add_tokens(["dog"])
    assert new(tokenizer=other)
    data = datasets.Dataset.from_list(PAIRS)
    assert new(data) and not new(data.select(range(6))) and new(data.select([1, 0, 2, 3, 4, 5]))
    path.write_text(path.read_text().replace("dog 3", "dog 4"))
    assert new()


def test_few_rows_code_of_other_origin_and_random_tokens_have_no_key(byte_level):
    data = datasets.Dataset.from_list(PAIRS)
    assert token_key(data, byte_level(), OPTIONS) and token_key(data.select(range(5)), byte_level(), OPTIONS) is None

    class Own(type(byte_level())):
        """May tokenise in its own way."""

    own = Own(tokenizer_object=byte_level().backend_tokenizer, eos_token="<s>")
    assert token_key(data, own, OPTIONS) is None
    random = byte_level()
    random.backend_tokenizer.model.dropout = 0.1
    assert token_key(data, random, OPTIONS) is None
