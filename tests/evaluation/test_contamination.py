"""Copies of items are found in every guise, and nothing else is."""

from __future__ import annotations

import re

import pytest

from fastalign.errors import DataError
from fastalign.evaluation.contamination import check_contamination
from fastalign.evaluation.suite import Suite

ENGLISH = [
    f"In the year {1500 + i} a traveller, who came from town number {i}, counted the windows of {i + 2} old houses; "
    f"how many were there in all of the streets?" for i in range(12)
]  # fmt: skip
CHINESE = [
    f"第{i}位旅行者来到一个古老的城市\uff0c他数了{i + 3}条街道上的窗户\uff0c请问一共有多少扇窗户\uff1f"
    for i in range(12)
]
SUITE = Suite.from_rows(
    "s", [{"id": str(i), "prompt": text, "answer": "1"} for i, text in enumerate(ENGLISH + CHINESE)]
)
OTHER = [
    f"Nothing of this text number {i} is in any item, and it is long enough to hold some n-grams." for i in range(9)
]


@pytest.mark.parametrize(
    "guise",
    [
        str,
        str.upper,
        lambda text: re.sub(r"(.{20}\S*) ", r"\1\r\n", text),
        lambda text: re.sub(r"([.,;?\uff0c\uff1f])", r" \1 ", text),
        lambda text: text.translate({i: i + 0xFEE0 for i in range(0x21, 0x7F)}),  # full width
        lambda text: f"{OTHER[0]} {text} {OTHER[1]}",
    ],
)
def test_every_copy_is_found_in_every_guise(guise):
    texts = [*OTHER, *map(guise, ENGLISH + CHINESE)]
    found = check_contamination(texts, [SUITE], rephrased=False)["suites"]["s"]
    assert [entry["id"] for entry in found["verbatim"]] == [str(i) for i in range(24)]
    assert found["contaminated"] and found["share"] == 1
    assert all(texts[entry["text"]] == guise((ENGLISH + CHINESE)[int(entry["id"])]) for entry in found["verbatim"])


def test_other_texts_hit_nothing():
    report = check_contamination(OTHER, [SUITE])
    assert not report["contaminated"]
    assert report["suites"]["s"]["verbatim"] == report["suites"]["s"]["rephrased"] == []


def test_one_item_of_many_is_accepted_and_listed():
    suite = Suite.from_rows("s", [{"prompt": f"{text} {n}", "answer": "1"} for n in range(9) for text in ENGLISH])
    text = "x " * 20 + "in the year 1503 a traveller, who came from town number 3, counted"
    found = check_contamination([text], [suite], rephrased=False)["suites"]["s"]
    assert found["share"] == len(found["verbatim"]) / 108


def test_boilerplate_does_not_count():
    header = "Answer the following question as well as you can, and give reasons for each step that you take."
    suite = Suite.from_rows("s", [{"prompt": f"{header} {text}", "answer": "1"} for text in ENGLISH])
    assert not check_contamination([header + OTHER[0]], [suite], rephrased=False)["contaminated"]
    one = Suite.from_rows("s", [{"prompt": f"{header} {ENGLISH[0]}", "answer": "1"}])
    many = [f"{header} {number} {OTHER[number % 9]}" for number in range(30)]
    assert not check_contamination(many, [one], rephrased=False)["contaminated"]
    assert check_contamination([f"{header} {ENGLISH[0]}"] * 30, [one], rephrased=False)["contaminated"]


def test_short_items_are_said_to_be():
    suite = Suite.from_rows("s", [{"id": "short", "prompt": "How are you?", "answer": "1"}])
    found = check_contamination(["How are you?"], [suite])["suites"]["s"]
    assert found["not_checkable"] == ["short"] and found["verbatim"] == [] and not found["contaminated"]


def test_nothing_to_check():
    with pytest.raises(DataError, match="0 texts and 1 suites"):
        check_contamination([], [SUITE])
