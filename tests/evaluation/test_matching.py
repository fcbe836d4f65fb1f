"""Right and wrong answers, by number and by words."""

from __future__ import annotations

import pytest

from fastalign.evaluation.matching import is_right, last_number, number_of


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("So the total is $1,234.50.", "1234.5", True),
        ("It is 12, not 13", "12", False),
        ("12 - 7 = 5", "5", True),
        ("the result of 12-7", "7", True),
        ("It is -7", "-7", True),
        ("It is \u22127 degrees", "-7", True),
        ("\\boxed{18} since 3 + 15", "18", True),
        ("#### 18\nHope that helps, 100 %", "18", True),
        ("18.", "Natalia sold 9 and 9.\n#### 18", True),
        ("about 1/2", "0.5", True),
        ("50%", "50", True),
        ("1e3", "1000", True),
        ("1/0", "1", False),
        ("none", "18", False),
        ("It is the Red  Sea!", "red sea", True),
        ("It is the bored sea", "red sea", False),
        ("the capital is not parisian", "Paris", False),
        ("答案是北京市。", "北京", True),
        ("答案是上海。", "北京", False),
    ],
)
def test_answers(answer, expected, right):
    assert is_right(answer, expected) == right


def test_numbers():
    assert number_of("$1,000") == 1000
    assert number_of("12 apples") is None
    assert last_number("no number") is None
    assert last_number("9" * 400) is not None
