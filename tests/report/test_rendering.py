"""How numbers and values are written, and that a template's values are escaped."""

import math

import jinja2
import pytest

from fastalign.report.rendering import format_number, format_text, render, text_table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),  # noqa: RUF001
        (True, "yes"),
        (0.0, "0"),
        (-0.0, "0"),
        (921600, "921,600"),
        (86.234, "86.2"),
        (-0.01234, "-0.0123"),
        (0.7, "0.7"),
        (100.0, "100"),
        (999.96, "1,000"),
        (12345.6, "12,346"),
        (5e-06, "5e-6"),
        (1.25e-11, "1.25e-11"),
        (3.2e9, "3.2e9"),
        (10**16, "10,000,000,000,000,000"),
        (math.nan, "NaN"),
        (-math.inf, "-∞"),
        ("5 min", "5 min"),
    ],
)
def test_numbers_as_people_write_them(value, text):
    assert format_number(value) == text.replace("-", "\N{MINUS SIGN}")


def test_changes_carry_their_sign():
    assert [format_number(v, sign=True) for v in (1, -1.5, 0.0)] == ["+1", "\N{MINUS SIGN}1.5", "0"]


def test_chat_messages_as_text():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert format_text(chat) == "system: Be brief.\n\nuser: Hi"
    assert format_text(["q_proj", 3, None]) == "q_proj, 3, \N{EN DASH}"


def test_a_value_that_a_template_misses_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="is undefined"):
        render("report.html.j2")


def test_a_table_for_the_terminal():
    rows = [["name", "count"], ["[bold]a", "1"], ["b", "1,234"]]
    assert text_table(rows, left=(0,)).splitlines() == [
        "name     count",
        "-------  -----",
        "[bold]a      1",
        "b        1,234",
    ]
