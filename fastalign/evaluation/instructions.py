"""Instructions whose fulfilment a program can check: length, layout, words, case, language.

`CHECKS` names them. A value says how much or what: `{"words_at_most": 50, "includes": ["salt", "pepper"]}`. An answer
follows an item's instructions if it passes every check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastalign.options import nearest


class Check(NamedTuple):
    """One kind of instruction.

    Attributes:
        passes: (answer, value) -> whether the answer follows it.
        value: What the value must be: "number", "text", "texts" (one or several), "counts" (text -> number),
            "pattern", "keys" (true, or the keys of an object), "language" or "yes" (true).
    """

    passes: Callable[[str, Any], bool]
    value: str


# Letters of a script that no other language of the table is written in.
_SCRIPTS = {
    "ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7af]", "zh": r"[\u4e00-\u9fff]", "ru": r"[\u0400-\u04ff]",
    "ar": r"[\u0600-\u06ff]", "he": r"[\u0590-\u05ff]", "hi": r"[\u0900-\u097f]", "th": r"[\u0e00-\u0e7f]",
    "el": r"[\u0370-\u03ff]",
}  # fmt: skip
# The commonest short words of languages in Latin letters, which few sentences do without.
_WORDS = {
    "en": "the of and to in is that it was for on are with as be this have from or by you not",
    "de": "der die das und ist nicht ein eine zu den mit sich des auf für von im dem auch es wird sind",
    "fr": "le la les de des et est un une du en que qui dans pour pas sur au il elle ce avec sont",
    "es": "el la los las de y es un una que en por con para no se del su al lo como más está",
    "it": "il la di che e è un una per non in con sono del della le i gli si da come nel più",
    "pt": "o a os as de e é um uma que em por com para não se do da no na como mais são",
    "nl": "de het een en van is in dat op te zijn met voor niet aan er ook als maar die om",
}
LANGUAGES = (*_SCRIPTS, *_WORDS)


def language_of(text: str) -> str | None:
    """The language of a text among `LANGUAGES`, by its letters and, in Latin ones, by its commonest words."""
    letters = sum(character.isalpha() for character in text)
    for name, script in _SCRIPTS.items():
        # Japanese is written with Chinese characters too, so a tenth of kana is enough.
        if letters and len(re.findall(script, text)) >= (0.1 if name == "ja" else 0.5) * letters:
            return name
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {name: sum(word in common for word in words) for name, common in _COMMON.items()}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] > 0 else None


_EAST_ASIAN = r"\u3040-\u30ff\u4e00-\u9fff"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\s{_EAST_ASIAN}]*[^\W{_EAST_ASIAN}][^\s{_EAST_ASIAN}]*")
_FULL_WIDTH_END = r"\u3002\uff01\uff1f"  # the Chinese full stop, exclamation and question marks
_SENTENCE_END = re.compile(rf"(?<=[.!?])[\"')\]]*(?:\s+|$)|(?<=[{_FULL_WIDTH_END}])")
_COMMA = re.compile("[,\uff0c\u3001]")
_COMMON = {name: frozenset(words.split()) for name, words in _WORDS.items()}


def _words(answer: str) -> int:
    """Words; each Chinese or Japanese character counts as one, since white space does not part them."""
    return len(_WORD.findall(answer))


def _sentences(answer: str) -> int:
    return len([part for part in _SENTENCE_END.split(answer.strip()) if part])


def _paragraphs(answer: str) -> int:
    return len([part for part in re.split(r"\n\s*\n", answer) if part.strip()])


def _lines(answer: str) -> list[str]:
    return [line.strip() for line in answer.splitlines() if line.strip()]


def _bullets(answer: str) -> int:
    return sum(bool(re.match(r"[-*•]\s+\S", line)) for line in _lines(answer))


def _numbered(answer: str) -> int:
    return sum(bool(re.match(r"\d+[.)]\s+\S", line)) for line in _lines(answer))


def _has(answer: str, text: str) -> bool:
    return text.casefold() in answer.casefold()


def _all(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _occurrences(answer: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE))


def _json(answer: str, keys: Any) -> bool:
    """Whether the answer, or the only block of code in it, is JSON; with `keys`, an object that has just these."""
    block = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)```\s*", answer, re.DOTALL)
    try:
        value = json.loads(block[1] if block else answer)
    except (ValueError, RecursionError):
        return False
    return keys is True or (isinstance(value, dict) and set(value) == set(_all(keys)))


def _has_upper(answer: str, upper: bool) -> bool:
    """Whether all letters that have a case are in upper case, or in lower case."""
    cased = [c for c in answer if c.upper() != c.lower()]
    return bool(cased) and all(c.isupper() == upper for c in cased)


CHECKS: dict[str, Check] = {
    "words_at_least": Check(lambda a, v: _words(a) >= v, "number"),
    "words_at_most": Check(lambda a, v: 0 < _words(a) <= v, "number"),
    "words": Check(lambda a, v: _words(a) == v, "number"),
    "characters_at_most": Check(lambda a, v: 0 < len(a.strip()) <= v, "number"),
    "sentences": Check(lambda a, v: _sentences(a) == v, "number"),
    "sentences_at_most": Check(lambda a, v: 0 < _sentences(a) <= v, "number"),
    "paragraphs": Check(lambda a, v: _paragraphs(a) == v, "number"),
    "lines": Check(lambda a, v: len(_lines(a)) == v, "number"),
    "bullets": Check(lambda a, v: _bullets(a) == v, "number"),
    "numbered": Check(lambda a, v: _numbered(a) == v, "number"),
    "placeholders": Check(lambda a, v: len(re.findall(r"\[[^\[\]]+\]", a)) >= v, "number"),
    "includes": Check(lambda a, v: all(_has(a, text) for text in _all(v)), "texts"),
    "excludes": Check(lambda a, v: bool(a.strip()) and not any(_has(a, text) for text in _all(v)), "texts"),
    "repeats": Check(lambda a, v: all(_occurrences(a, text) == n for text, n in v.items()), "counts"),
    "one_of": Check(lambda a, v: a.strip().strip(".\"'").casefold() in {t.casefold() for t in _all(v)}, "texts"),
    "starts_with": Check(lambda a, v: a.strip().casefold().startswith(v.casefold()), "text"),
    "ends_with": Check(lambda a, v: a.strip().casefold().endswith(v.casefold()), "text"),
    "matches": Check(lambda a, v: re.search(v, a) is not None, "pattern"),
    "json": Check(_json, "keys"),
    "upper_case": Check(lambda a, v: _has_upper(a, True), "yes"),
    "lower_case": Check(lambda a, v: _has_upper(a, False), "yes"),
    "no_commas": Check(lambda a, v: bool(a.strip()) and not _COMMA.search(a), "yes"),
    "quoted": Check(lambda a, v: re.fullmatch(r'\s*["“].*["”]\s*', a, re.DOTALL) is not None, "yes"),
    "titled": Check(lambda a, v: re.search(r"<<[^<>\n]+>>", a) is not None, "yes"),
    "language": Check(lambda a, v: language_of(a) == v, "language"),
}


def check_problem(checks: Any) -> str | None:
    """What is wrong with an item's `checks`, in words; None if they can be used."""
    if not isinstance(checks, Mapping):
        return f"checks is a {type(checks).__name__}; expected a mapping, such as {{'words_at_most': 50}}"
    for name, value in checks.items():
        if name not in CHECKS:
            return f"there is no check {name!r}; {nearest(name, CHECKS)}"
        if not _FITS[CHECKS[name].value](value):
            return f"the check {name} has the value {value!r:.60}; expected {_EXPECTED[CHECKS[name].value]}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_texts(value: Any) -> bool:
    return bool(value) and (isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value))))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_pattern(value: Any) -> bool:
    try:
        return _is_text(value) and re.compile(value) is not None
    except re.error:
        return False


_FITS: dict[str, Callable[[Any], bool]] = {
    "number": _is_number,
    "text": _is_text,
    "texts": _are_texts,
    "counts": lambda v: isinstance(v, Mapping) and bool(v) and all(map(_is_number, v.values())),
    "pattern": _is_pattern,
    "keys": lambda v: v is True or _are_texts(v),
    "yes": lambda v: v is True,
    "language": lambda v: v in LANGUAGES,
}
_EXPECTED = {
    "number": "a whole number from 1 on",
    "text": "a text",
    "texts": "a text or a list of texts",
    "counts": "a mapping of texts to how often each occurs",
    "pattern": "a regular expression",
    "keys": "true, or the list of the object's keys",
    "yes": "true",
    "language": f"one of {', '.join(LANGUAGES)}",
}


def follows(answer: str, checks: Mapping[str, Any]) -> dict[str, bool]:
    """Whether an answer follows each instruction, by the name of its check."""
    return {name: CHECKS[name].passes(answer, value) for name, value in checks.items()}
