"""A tokenizer's chat template, and what it writes around answers."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastalign.data.messages import RowProblem


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer, with the tools and options of one row."""

    tokenizer: Any
    tools: list | None = None
    options: dict | None = None

    def __call__(self, turns: list[dict], generation: bool = False) -> str:
        """The text of some turns, with the beginning of an answer behind them if `generation`."""
        turns = [{key: value for key, value in turn.items() if key != "train"} for turn in turns]
        try:
            return self._render(turns, generation)
        except Exception as error:  # a chat template is code from elsewhere and may raise anything
            problem = RowProblem("chat template error", f"the chat template refuses it: {error!s:.120}")
            if not any("tool_calls" in turn for turn in turns):
                raise problem from error
        try:  # some templates want the arguments of tool calls as JSON text
            return self._render([_with_text_arguments(turn) for turn in turns], generation)
        except Exception as error:  # as above
            raise problem from error

    def _render(self, turns: list[dict], generation: bool) -> str:
        return self.tokenizer.apply_chat_template(
            turns, tools=self.tools, tokenize=False, add_generation_prompt=generation, **(self.options or {})
        )


def _with_text_arguments(turn: dict) -> dict:
    turn = copy.deepcopy(turn)
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return turn


def stop_text(template: Template) -> str:
    """The special token that the chat template writes behind every answer, the last or not; empty if there is none."""
    return _stop_text(template.tokenizer, str(template.tokenizer.chat_template))


@lru_cache(maxsize=8)
def _stop_text(tokenizer, chat_template: str) -> str:
    """What ends an answer: the text that follows it whether a question or another answer comes next.

    It is found by rendering two made-up conversations. Here both continue with <|end|>, and differ after that:

    ... <|assistant|> ANSWER <|end|> <|user|> ...
    ... <|assistant|> ANSWER <|end|> <|assistant|>
    """
    template, answer = Template(tokenizer), "placeholder"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        opening = template(turns[:1], True).removeprefix(template(turns[:1]))  # of an answer, in most templates
        texts = [template(turns, True), template([*turns, {"role": "user", "content": "more"}])]
    except RowProblem:
        return tokenizer.eos_token
    first, second = (text.partition(answer)[2] for text in texts)
    shared = first[: shared_length(first, second, tokenizer)]
    match = _special_tokens(tokenizer, chat_template).search(shared)
    if not match or (first.endswith(opening) and match.start() >= len(first) - len(opening)):
        return ""  # nothing, or what the next turn begins with
    return match[0]


@lru_cache(maxsize=8)
def _special_tokens(tokenizer, chat_template: str) -> re.Pattern:
    """Matches the tokenizer's special tokens, longer ones first. A new chat template goes with a new entry."""
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)))


def shared_length(one: str, other: str, tokenizer) -> int:
    """How many characters two texts share at their beginning, where no special token is cut in two."""
    shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    for text in (one, other):
        for match in _special_tokens(tokenizer, str(tokenizer.chat_template)).finditer(text):
            if match.start() < shared < match.end():
                shared = match.start()
    return shared
