"""Which of two answers is better by a rule that can be stated in a word: shorter, longer, contains, regex, answer.

A rule gives each answer a score, and the higher score wins; equal scores are a tie. A rule cannot see quality. It says
whether a model does one thing more often, which a person or a judge must want.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastalign.errors import ConfigError, DataError
from fastalign.evaluation.matching import is_right
from fastalign.options import nearest
from fastalign.stats.paired import mcnemar

Rule = Callable[[str, Mapping[str, Any]], float]  # (answer, the prompt's row) -> score, higher is better

RULES = {
    "shorter": "the answer with fewer words wins",
    "longer": "the answer with more words wins",
    "contains:TEXT": "the answer that contains the text wins, in any case of letters",
    "regex:PATTERN": "the answer in which the regular expression is found wins",
    "answer": "the answer that is right wins: its last number, or its words, are those of the row's column `answer`",
}


def read_rule(text: str) -> Rule:
    """The rule of a text such as "shorter" or "contains:thank you".

    Raises:
        ConfigError: there is no such rule, or its text or pattern is missing or not valid.
    """
    name, colon, rest = text.partition(":")
    known = {key.partition(":")[0]: ":" in key for key in RULES}
    if name not in known:
        raise ConfigError(f"rule is {text!r}; {nearest(name, RULES)}")
    if known[name] != bool(rest) or (colon and not rest):
        raise ConfigError(f"rule is {text!r}; write it as {next(key for key in RULES if key.startswith(name))}")
    if name == "shorter":
        return lambda answer, row: -len(answer.split())
    if name == "longer":
        return lambda answer, row: len(answer.split())
    if name == "contains":
        return lambda answer, row: rest.casefold() in answer.casefold()
    if name == "regex":
        try:
            pattern = re.compile(rest)
        except re.error as error:
            raise ConfigError(f"rule is {text!r}, which is no regular expression: {error}") from error
        return lambda answer, row: pattern.search(answer) is not None
    return _is_right


def _is_right(answer: str, row: Mapping[str, Any]) -> bool:
    expected = row.get("answer")
    if expected is None or not str(expected).strip():
        raise DataError("The rule 'answer' needs a column `answer` with the right answer in every row of the prompts.")
    return is_right(answer, str(expected))


def compare_answers(
    first: Sequence[str], second: Sequence[str], rows: Sequence[Mapping[str, Any]], rule: str
) -> dict[str, Any]:
    """Which of two models wins more prompts by a rule.

    Args:
        first: the answers of the first model, one per prompt.
        second: the answers of the second model.
        rows: the rows that the prompts come from.
        rule: see `read_rule`.

    Returns:
        `rule`, `first`, `second` and `ties` (numbers of prompts), `win_rate` of the second model (a tie counts half),
        `p_value` of the exact sign test (ties left out; whether one of the two wins more than by chance), and
        `verdicts`, one of "first", "second" and "tie" per prompt.

    References:
        McNemar 1947, doi:10.1007/BF02295996.
    """
    score = read_rule(rule)
    verdicts = []
    for a, b, row in zip(first, second, rows, strict=True):
        old, new = score(a, row), score(b, row)
        verdicts.append("tie" if old == new else "second" if new > old else "first")
    won, lost = verdicts.count("second"), verdicts.count("first")
    p_value = mcnemar([v == "first" for v in verdicts], [v == "second" for v in verdicts]) if verdicts else 1.0
    rate = (won + 0.5 * verdicts.count("tie")) / len(verdicts) if verdicts else 0.5
    return {
        "rule": rule, "first": lost, "second": won, "ties": verdicts.count("tie"), "win_rate": rate,
        "p_value": float(p_value), "verdicts": verdicts,
    }  # fmt: skip
