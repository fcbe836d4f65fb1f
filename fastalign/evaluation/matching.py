"""Whether an answer holds the right number or the right words."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?%?"  # 1,234.5, 1/2, 50%
    r"|[-+\u2212]?\.\d+"  # .5
)
_TOLERANCE = 1e-6  # relative, of numbers


def is_right(answer: str, expected: str) -> bool:
    r"""Whether an answer is right.

    - If a number is expected, the last number of the answer must be it. Commas between thousands, currency signs, a
      percent sign and fractions are understood, and `\boxed{...}` or `####` mark the number that counts.
    - If words are expected, the answer must hold them in this order, in any case of letters, as whole words.

    Args:
        answer: What the model wrote.
        expected: The right number or words. Of a text with `####`, as in GSM8K, what follows it.
    """
    expected = expected.rpartition("####")[2].strip()
    if (number := number_of(expected)) is not None:
        found = last_number(answer)
        return found is not None and abs(found - number) <= _TOLERANCE * max(1.0, abs(number))
    words = r"\s+".join(re.escape(word) for word in expected.split())
    # Chinese and Japanese are written without spaces, so there is no border of words to look for.
    before = r"(?<!\w)" if _is_spaced(expected[:1]) else ""
    behind = r"(?!\w)" if _is_spaced(expected[-1:]) else ""
    return re.search(before + words + behind, answer, re.IGNORECASE) is not None


def number_of(text: str) -> float | None:
    """The value of a text that is a number and nothing else; None for other text."""
    text = text.strip().strip("$€£").strip()
    return _value(text) if _NUMBER.fullmatch(text) else None


def last_number(answer: str) -> float | None:
    """The number that an answer ends with, or that it marks as its result; None if it holds none."""
    for mark in (r"\\boxed\{([^{}]*)\}", r"####\s*([^\n]+)"):
        if marked := re.findall(mark, answer):
            answer = marked[-1]
            break
    # "12-7" holds 7, not -7: a sign counts only where no digit stands before it.
    found = list(_NUMBER.finditer(answer))
    if not found:
        return None
    text = found[-1][0]
    if text[0] in "+-\u2212" and found[-1].start() and answer[found[-1].start() - 1].isalnum():
        text = text[1:]
    return _value(text)


def _value(text: str) -> float | None:
    text = re.sub(r"[,\s]", "", text).replace("\u2212", "-")
    text = text.rstrip("%")  # 12 % and 12 are the same answer to "how many percent?"
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def _is_spaced(character: str) -> bool:
    return bool(re.match(r"\w", character)) and not re.match(r"[\u3040-\u30ff\u4e00-\u9fff]", character)
