"""Rules that decide between two answers, and who wins."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from fastalign.errors import ConfigError, DataError
from fastalign.evaluation.rules import RULES, compare_answers, read_rule


@pytest.mark.parametrize(
    ("rule", "row", "better", "worse"),
    [
        ("shorter", {}, "one two", "one two three"),
        ("longer", {}, "one two three", "onetwothree"),
        ("contains:Thank you", {}, "I thank YOU.", "I thank her."),
        (r"regex:^\d+$", {}, "42", "42 apples"),
        ("answer", {"answer": 1200}, "so it is 1,200.", "1200 or 13"),
        ("answer", {"answer": "-3.5"}, "x = -3.50", "x = 3.5"),
        ("answer", {"answer": "New York"}, "It is new  york!", "It is New Yorkshire."),
    ],
)
def test_the_better_answer_has_the_higher_score(rule, row, better, worse):
    score = read_rule(rule)
    assert score(better, row) > score(worse, row)


def test_who_wins():
    rows = [{}] * 10
    found = compare_answers(["a a"] * 8 + ["a"] * 2, ["a"] * 7 + ["a a a"] + ["a"] * 2, rows, "shorter")
    assert (found["first"], found["second"], found["ties"], found["win_rate"]) == (1, 7, 2, 0.8)
    assert found["p_value"] == pytest.approx(binomtest(7, 8).pvalue)
    assert found["verdicts"] == ["second"] * 7 + ["first"] + ["tie"] * 2


@pytest.mark.parametrize("rule", ["shortest", "contains", "contains:", "shorter:3", "regex:(", "answer:x"])
def test_rules_that_are_refused(rule):
    with pytest.raises(ConfigError, match="rule is"):
        read_rule(rule)
    assert len(RULES) == 5


def test_a_right_answer_must_be_known():
    with pytest.raises(DataError, match="column `answer`"):
        read_rule("answer")("a", {})
