"""Whether a chat template wrote all that a row holds: the words, thoughts and tool calls of answers, and the tools.

Some templates cut thoughts from answers, and others know nothing of tools. What such a template leaves out of an answer
that is scored would be missing in silence.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache

from fastalign.data.messages import RowProblem
from fastalign.data.template import Template

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a turn that hold what the model thought
_PLACEHOLDER = "fastalign-answer"


def missing_parts(turn: dict, text: str) -> list[str]:
    """Which parts of an answer a text lacks: "thoughts", "words", "tool calls". White space does not count."""
    text = _squeezed(text)
    content = turn["content"] if isinstance(turn["content"], str) else ""
    thoughts, _, words = content.rpartition("</think>")
    wanted = []
    if _squeezed(content) not in text:
        wanted += [("thoughts", thoughts.replace("<think>", "")), ("words", words)]
    wanted += [("thoughts", turn[key]) for key in THOUGHTS if isinstance(turn.get(key), str)]
    wanted += [("tool calls", name) for name in _called(turn)]
    return list(dict.fromkeys(part for part, words in wanted if _squeezed(words) not in text))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _called(turn: dict) -> list[str]:
    """The names of the functions that a turn calls."""
    calls = turn.get("tool_calls") or []
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [f["name"] for f in functions if isinstance(f, dict) and isinstance(f.get("name"), str)]


def writes_thoughts_elsewhere(template: Template) -> bool:
    """Whether the chat template knows thoughts, but writes them without <think>, as into a channel of their own."""
    return _thoughts_elsewhere(template.tokenizer, str(template.tokenizer.chat_template))


@lru_cache(maxsize=8)
def _thoughts_elsewhere(tokenizer, chat_template: str) -> bool:
    del chat_template  # a new one goes with a new entry
    answer = {"role": "assistant", "content": "answer", **dict.fromkeys(THOUGHTS, _PLACEHOLDER)}
    try:
        text = Template(tokenizer)([{"role": "user", "content": "question"}, answer])
    except RowProblem:
        return False
    return _PLACEHOLDER in text and "</think>" not in text


def whole_text(text: str, start: int, turns: list[dict], template: Template, counts: Counter) -> str:
    """The text of a conversation with all of its last answer.

    A template that cuts the thoughts is given a placeholder as the answer. The answer is then put into its place.

    Args:
        text: what the template writes for `turns`.
        start: where the last answer starts in it.
        turns: the conversation, which ends with an answer that is scored.
        template: the chat template.
        counts: `thoughts_kept` is counted up if the answer had to be put in.

    Raises:
        RowProblem: the template leaves out a part of the answer, which cannot be put in either.
    """
    missing = missing_parts(turns[-1], text[start:])
    if not missing:
        return text
    written = _write_out(turns, template) if "tool calls" not in missing else None
    if written is None:
        raise RowProblem(
            "words left out",
            f"the chat template leaves out the {' and the '.join(missing)} of the last answer: use a template that "
            "writes them, or remove them from the row",
        )
    counts["thoughts_kept"] += 1
    return written


def _write_out(turns: list[dict], template: Template) -> str | None:
    """The conversation with the last answer put in behind the template's back; None if there is no place for it."""
    answer = turns[-1]
    content = answer["content"] if isinstance(answer["content"], str) else ""
    thoughts = next((answer[key] for key in THOUGHTS if isinstance(answer.get(key), str)), "")
    if _squeezed(thoughts) not in _squeezed(content):
        if not {"<think>", "</think>"} <= template.tokenizer.get_added_vocab().keys():
            return None  # how this model marks its thoughts is unknown
        content = f"<think>\n{thoughts.strip()}\n</think>\n\n{content}"
    bare = {key: value for key, value in answer.items() if key not in THOUGHTS} | {"content": _PLACEHOLDER}
    head, placeholder, tail = template([*turns[:-1], bare]).partition(_PLACEHOLDER)
    if not placeholder or _PLACEHOLDER in tail or ("</think>" in content and head.rstrip().endswith("</think>")):
        return None
    return head + content.strip() + tail


def refuse_ignored_tools(text: str, turns: list[dict], template: Template) -> None:
    """Refuses a row whose tools or tool calls change nothing in its text.

    Raises:
        RowProblem: the template does not write them.
    """
    bare = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in turns]
    for name, differs, other, others in (
        ("tools", bool(template.tools), replace(template, tools=None), turns),
        ("tool calls", bare != turns, template, bare),
    ):
        if differs and _text_or_none(other, others) == text:
            raise RowProblem(
                "tools left out",
                f"the chat template leaves out the {name}: use a template that writes them, or remove them",
            )


def _text_or_none(template: Template, turns: list[dict]) -> str | None:
    try:
        return template(turns)
    except RowProblem:  # it needs what was taken away
        return None
