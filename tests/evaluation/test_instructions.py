"""Each check, with an answer that follows the instruction and one that does not."""

from __future__ import annotations

import pytest

from fastalign.evaluation.instructions import CHECKS, follows, language_of

CASES = [
    ("words_at_least", 2, "one two", "one"),
    ("words_at_most", 2, "one two", "one two three"),
    ("words_at_most", 2, "one - two", ""),
    ("words", 2, "你好", "你好吗"),
    ("words", 2, "don't stop.", "do not stop"),
    ("characters_at_most", 3, "abc ", "abcd"),
    ("sentences", 2, 'He said "no." Then he left.', "One. Two. Three."),
    ("sentences", 2, "你好。再见。", "你好。"),
    ("sentences_at_most", 1, "Pi is 3.14 here.", "One. Two."),
    ("paragraphs", 2, "a\n\nb", "a\nb"),
    ("lines", 2, "a\n\nb\n", "a"),
    ("bullets", 2, "- a\n* b", "- a"),
    ("numbered", 2, "1. a\n2) b", "1 a\n2 b"),
    ("placeholders", 1, "Dear [name],", "Dear you,"),
    ("includes", ["salt", "oil"], "Salt and oil", "salt"),
    ("excludes", "salt", "oil", "SALT"),
    ("excludes", "salt", "oil", " "),
    ("repeats", {"tea": 2}, "Tea and tea, a team", "tea"),
    ("one_of", ["yes", "no"], "Yes.", "yes and no"),
    ("starts_with", "Well", "well, then", "so, well"),
    ("ends_with", "The end.", "x The end.\n", "The end. x"),
    ("matches", r"\d{3}", "a 123", "a 12"),
    ("json", True, "[1]", "[1"),
    ("json", ["a", "b"], '```json\n{"a": 1, "b": 2}\n```', '{"a": 1}'),
    ("json", ["a"], '{"a": 1}', 'Here: {"a": 1}'),
    ("upper_case", True, "ALL 1!", "All"),
    ("lower_case", True, "all 1!", "123"),
    ("no_commas", True, "a b", "a, b"),
    ("quoted", True, '"a"', '"a" b'),
    ("titled", True, "<<A>> b", "<A> b"),
    ("language", "de", "Der Hund ist nicht im Haus.", "The dog is not in the house."),
]


@pytest.mark.parametrize(("name", "value", "good", "bad"), CASES)
def test_an_answer_that_follows_and_one_that_does_not(name, value, good, bad):
    assert follows(good, {name: value}) == {name: True}
    assert follows(bad, {name: value}) == {name: False}


def test_every_check_has_its_case():
    assert {case[0] for case in CASES} == set(CHECKS)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("zh", "今天天气很好。"),
        ("ja", "今日はいい天気です。"),
        ("ko", "오늘 날씨가 좋다"),
        ("ru", "Сегодня хорошая погода"),
        ("ar", "الطقس جميل اليوم"),
        ("en", "It is a nice day for a walk in the park."),
        ("fr", "Il fait beau dans le jardin et les enfants sont là."),
        ("es", "El perro está en la casa con los niños."),
        ("it", "Il cane è nella casa con la famiglia e non si muove."),
        ("pt", "O menino não está em casa, mas na escola."),
        ("nl", "Het is een mooie dag en de zon schijnt ook voor ons."),
        (None, "12345"),
    ],
)
def test_languages(language, text):
    assert language_of(text) == language
