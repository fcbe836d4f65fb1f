"""Reading suites, and every row that is refused."""

from __future__ import annotations

import json

import pytest

from fastalign.errors import DataError
from fastalign.evaluation.suite import Suite, shipped_suites

GOOD = {"id": "a", "prompt": "2 + 2 =", "choices": ["3", "4"], "label": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": " "}, "prompt is ' '"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": None, "messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"choices": ["3"]}, "at least two texts"),
        ({"choices": ["3", 4]}, "at least two texts"),
        ({"choices": ["3", " "]}, "is empty"),
        ({"choices": ["3", "3"]}, "the same text"),
        ({"label": "5"}, "'5' is not among its 2 choices"),
        ({"label": None, "answer": "5"}, "'5' is not among its 2 choices"),
        ({"label": 2}, "label is 2; expected 0 to 1"),
        ({"label": True}, "label is True"),
        ({"choices": None}, "nothing says what is right"),
        ({"checks": {"words_at_most": 3}}, "only one of them"),
        ({"choices": None, "checks": ["short"]}, "expected a mapping"),
        ({"choices": None, "checks": {"words_at_mots": 3}}, "did you mean 'words_at_most'"),
        ({"choices": None, "checks": {"words_at_most": "3"}}, "expected a whole number"),
        ({"choices": None, "checks": {"matches": "("}}, "expected a regular expression"),
        ({"choices": None, "answer": True}, "answer is True"),
        ({"choices": None, "tests": 3}, "expected Python code"),
    ],
)
def test_rows_that_are_no_items(change, said):
    with pytest.raises(DataError, match="Item 1 of the suite s: ") as error:
        Suite.from_rows("s", [{**GOOD, **change}])
    assert said in str(error.value)


def test_what_an_item_may_say():
    rows = [
        GOOD, {**GOOD, "id": "b", "label": "4"}, {"question": "1 + 1?", "answer": 2, "category": "sums"},
        {"task_id": "H/0", "prompt": "def f():", "test": "def check(f): f()", "entry_point": "f"},
        {"messages": [{"role": "user", "content": "Hi"}], "checks": {"words": 1}},
    ]  # fmt: skip
    items = Suite.from_rows("s", rows).items
    assert [item.kind for item in items] == ["choices", "choices", "answer", "tests", "checks"]
    assert [item.label for item in items[:2]] == [1, 1]
    assert [item.id for item in items] == ["a", "b", "3", "H/0", "5"]
    assert (items[2].answer, items[2].category, items[0].category) == ("2", "sums", "s")
    assert items[3].tests.endswith("check(f)")


def test_ids_differ():
    with pytest.raises(DataError, match=r"Item 2 .* has the id 'a' of an item before it"):
        Suite.from_rows("s", [GOOD, GOOD])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no item"),
        (b"{", "item 1 is not valid JSON"),
        (b"[1]", "item 1 is a list"),
        (b'{"prompt": "' + b"x" * 50_000_000 + b'"}', "item 1 is longer than 1,000,000 bytes"),
        (b"\xff\xfe", "item 1 is not valid JSON"),
        (b"[" * 200_000, "item 1 is not valid JSON"),
    ],
)
def test_files_that_are_no_suites(tmp_path, content, said):
    file = tmp_path / "s.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        Suite.read(file)
    assert said in str(error.value)


def test_files_and_names(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(GOOD) + "\r\n\n")
    assert Suite.read(file).name == "mine"
    with pytest.raises(DataError, match="did you mean 'knowledge'"):
        Suite.read("knowlege")
    for name in shipped_suites():
        assert len(Suite.read(name).items) >= 100
