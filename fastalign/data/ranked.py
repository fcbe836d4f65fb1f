"""Answers with ratings, ranks or a winner, made into pairs. The rule everywhere: the best answer against the worst."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fastalign.data.messages import RowProblem, holds_messages

RULE = "the best answer is chosen, and the worst rejected"
# Keys of an answer that hold what was rated. The first one that is there counts.
_TEXTS = ("response", "completion", "answer", "text", "content", "output", "messages")
# The mean over several aspects is more reliable than the overall score of UltraFeedback, which has known errors.
_RATINGS = ("fine-grained_score", "overall_score", "score", "rating", "reward", "pm_score")
_RANKS = ("rank", "ranking")  # 1 (or 0) is the best one


def best_and_worst(answers: Iterable[tuple[Any, float]]) -> list[dict]:
    """The pair of the answer with the highest value and the one with the lowest; none if all are rated alike.

    Of answers with the same value the first one is taken.
    """
    answers = list(answers)
    if len(answers) < 2:
        return []
    best, worst = max(answers, key=lambda pair: pair[1]), min(answers, key=lambda pair: pair[1])
    return [{"chosen": best[0], "rejected": worst[0]}] if best[1] > worst[1] else []


def of_two(first, second, winner, names: tuple[tuple[str, ...], tuple[str, ...]]) -> list[dict]:
    """The pair of two answers of which one won; none at a tie, which is any text that begins with "tie" or "both".

    Args:
        first: an answer.
        second: another answer.
        winner: which one is better.
        names: what `winner` may be if the first one is better, and if the second one is, in lower case.

    Raises:
        RowProblem: `winner` is none of these.
    """
    said = str(int(winner) if isinstance(winner, float) and winner.is_integer() else winner).strip().lower()
    if said in names[0] or said in names[1]:
        value = float(said in names[0])
        return best_and_worst([(first, value), (second, 1 - value)])
    if said.startswith(("tie", "both", "neither")):
        return []
    raise RowProblem(
        "wrong type", f"the better one of two answers must be one of {names[0] + names[1]}, found {said!r:.40}"
    )


def with_values(answers, values, sign: int = 1) -> list[dict]:
    """The pair of answers whose ratings (`sign` 1) or ranks (`sign` -1) are in a list of their own.

    Raises:
        RowProblem: the lists have different lengths, or hold something else.
    """
    if not isinstance(answers, list) or not isinstance(values, list) or len(answers) != len(values):
        raise RowProblem("wrong type", f"needs as many ratings as answers, found {values!r:.60}")
    return best_and_worst(
        [(_text(a), sign * _number(v)) for a, v in zip(answers, values, strict=True) if v is not None]
    )


def in_order(answers) -> list[dict]:
    """The pair of the first and the last answer of a list that starts with the best one."""
    if not isinstance(answers, list):
        raise RowProblem("wrong type", f"ranked answers must be a list, found {answers!r:.60}")
    return best_and_worst([(_text(answer), -float(place)) for place, answer in enumerate(answers)])


def has_value(answer) -> bool:
    """Whether an answer holds its own rating or rank."""
    return isinstance(answer, dict) and _value(answer) is not None


def rated(answers) -> list[dict]:
    """The pair of answers that hold their own rating or rank. Answers without one are left out."""
    if not isinstance(answers, list):
        raise RowProblem("wrong type", f"rated answers must be a list, found {answers!r:.60}")
    values = [(answer, _value(answer)) for answer in answers if isinstance(answer, dict)]
    return best_and_worst([(_text(answer), value) for answer, value in values if value is not None])


def _value(answer: dict) -> float | None:
    for names, sign in ((_RATINGS, 1), (_RANKS, -1)):
        for name in names:
            if answer.get(name) is not None:
                return sign * _number(answer[name])
    return None


def _number(value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise RowProblem("wrong type", f"a rating must be a number, found {value!r:.40}")
    return number


def _text(answer) -> str | Sequence | dict:
    """What an answer says: a string, or messages."""
    if isinstance(answer, str) or holds_messages(answer):
        return answer
    for name in _TEXTS:
        if isinstance(answer, dict) and isinstance(answer.get(name), (str, list)):
            return answer[name]
    raise RowProblem("wrong type", f"an answer must be text, or an object with one of {_TEXTS}, found {answer!r:.60}")
