"""From a row in any of the common formats to one prompt text and its completion texts.

Plain strings are taken as they are. Chat messages go through the tokenizer's chat template. Either way a row becomes an
`Example`. A row that cannot become one raises `RowProblem`, and `fastalign.data.tokenize` collects these over the whole
data set, so that one error can name all bad rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets

from fastalign.errors import DataError

# Name of each format and its columns. A data set has the first format whose columns it has.
FORMATS = {
    "preference": ("prompt", "chosen", "rejected"),
    "preference with implicit prompt": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}

_REWRITTEN = ("chat template error", "the template rewrites earlier turns: keep one assistant turn per row")


class RowProblem(Exception):
    """A row that cannot be used.

    Attributes:
        kind: the kind of problem, which is counted over the data set.
        detail: what is wrong with this row.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Format:
    """The format of a data set.

    Attributes:
        name: a key of `FORMATS`.
        chat: whether the rows hold chat messages; otherwise they hold plain strings.
    """

    name: str
    chat: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that rows of this format have."""
        return FORMATS[self.name]

    def __str__(self) -> str:
        return f"{self.name}, {'chat messages' if self.chat else 'plain strings'}"


@dataclass
class Example:
    """One prompt and its completions as text.

    Attributes:
        prompt: the text of the prompt; empty for plain text.
        completions: the texts of the completions, chosen before rejected.
        spans: for each completion the ranges of its characters that are scored, or None if all of it is scored.
        label: of an unpaired row, whether the completion is desirable.
        template_mismatch: whether the chat template's answers start differently than its generation prompt does.
    """

    prompt: str
    completions: list[str]
    spans: list[list[tuple[int, int]] | None]
    label: bool | None = None
    template_mismatch: bool = False


def detect_format(rows: datasets.Dataset) -> Format:
    """The format of a data set, from its columns and the first value in each.

    A column that is null in every row counts as missing. The rows hold chat messages if the first value of one of the
    format's columns is a list.

    Raises:
        DataError: the data set has the columns of no format.
    """
    wanted = [name for name in dict.fromkeys(sum(FORMATS.values(), ())) if name in rows.column_names]
    first = {name: next((value for value in rows[name] if value is not None), None) for name in wanted}
    for name, columns in FORMATS.items():
        if all(first.get(column) is not None for column in columns):
            return Format(name, chat=any(isinstance(first[column], list) for column in columns))
    known = "; ".join("/".join(columns) for columns in FORMATS.values())
    raise DataError(
        f"No known format: the data set has the columns {', '.join(rows.column_names) or '(none)'}, and one of these "
        f"sets must be there and filled: {known}. Rename the columns to fit."
    )


def to_example(row: dict, fmt: Format, tokenizer) -> Example:
    """The row as an `Example`.

    Args:
        row: a row of the data set.
        fmt: the format of the data set.
        tokenizer: its chat template renders chat messages.

    Raises:
        RowProblem: the row lacks a field, has a value of a wrong type or an empty completion, is a pair of equal
            completions, or cannot be rendered.
    """
    for column in fmt.columns:
        if row.get(column) is None:
            raise RowProblem("missing field", f"{column!r} is missing or null")
    try:
        example = _chat_example(row, fmt, tokenizer) if fmt.chat else _string_example(row, fmt)
    except RecursionError as error:
        raise RowProblem("wrong type", "its messages are nested too deeply") from error
    if fmt.name == "unpaired":
        example.label = _as_label(row["label"])
    return example


def _as_label(value) -> bool:
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RowProblem("wrong type", f"'label' must be true or false, found {value!r:.60}")


# Plain strings


def _string_example(row: dict, fmt: Format) -> Example:
    for column in fmt.columns:
        if column != "label" and not isinstance(row[column], str):
            raise RowProblem("wrong type", f"{column!r} must be a string, found {type(row[column]).__name__}")
    prompt = row["prompt"] if "prompt" in fmt.columns else ""
    completions = [row[column] for column in fmt.columns if column not in ("prompt", "label")]
    if any(not text.strip() for text in completions):
        raise RowProblem("empty completion", "a completion holds no text")
    if len(completions) == 2:
        _refuse_identical(*completions)
    if fmt.name == "preference with implicit prompt":
        cut = _implicit_prompt_length(*completions)
        prompt, completions = completions[0][:cut], [text[cut:] for text in completions]
    return Example(prompt, completions, [None] * len(completions))


def _implicit_prompt_length(chosen: str, rejected: str) -> int:
    """How many characters of the text that both strings start with are the prompt: up to the last space in that text.

    The prompt ends before a space. A cut inside a word would give tokens that never occur in generation, and a cut
    after the space would separate the space from the word, although one token usually holds both. Each completion must
    have a word left.
    """
    # The last character that is no space stays in the completion: a blank completion would be an empty one.
    shared = min(len(chosen.rstrip()), len(rejected.rstrip())) - 1
    shared = next((n for n in range(shared) if chosen[n] != rejected[n]), shared)
    for cut in range(shared, 0, -1):
        if not chosen[cut - 1].isspace() and chosen[cut].isspace() and rejected[cut].isspace():
            return cut
    return 0


def _refuse_identical(chosen, rejected) -> None:
    if chosen == rejected:
        raise RowProblem("identical pair", "chosen and rejected are the same")


# Chat messages


def _chat_example(row: dict, fmt: Format, tokenizer) -> Example:
    prompt = _messages(row["prompt"], "user", "prompt") if "prompt" in fmt.columns else []
    names = [column for column in fmt.columns if column not in ("prompt", "label")]
    completions = [_messages(row[name], "assistant", name) for name in names]
    if len(completions) == 2:
        _refuse_identical(*completions)
    if _repeats_prompt(prompt, isinstance(row.get("prompt"), str), completions):
        prompt = []
    if not prompt or any(completion[0]["role"] != "assistant" for completion in completions):
        shared = _shared_turns(completions)
        prompt = prompt + completions[0][:shared]
        completions = [completion[shared:] for completion in completions]
    if not prompt:
        raise RowProblem("no prompt", "the first turn is an assistant's: put a user or system turn before it")
    completions = [_up_to_last_answer(completion) for completion in completions]
    template = partial(_apply_template, tokenizer, _tools(row))
    return _render(prompt, completions, template, tokenizer.eos_token)


def _messages(value, role: str, column: str) -> list[dict]:
    """A value as messages, checked. A plain string becomes one message of the given role.

    Arrow gives every message all keys that occur in the data set, null where a message lacks one. Nulls are removed,
    since a chat template may ask only whether a key is there.
    """
    if isinstance(value, str) and column != "messages":
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise RowProblem("wrong type", f"{column!r} must be a non-empty list of messages, found {value!r:.60}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowProblem(
                "wrong type", f"{column!r} needs messages with 'role' and 'content', found {message!r:.80}"
            )
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise RowProblem("wrong type", f"{column!r} has a message whose content is {message['content']!r:.60}")
    return [{"content": "", **_without_nulls(message)} for message in value]


def _without_nulls(value) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _repeats_prompt(prompt: list[dict], prompt_is_string: bool, completions: list[list[dict]]) -> bool:
    """Whether the completions are whole conversations, which repeat the prompt."""
    # The prompt as a string, and conversations that start with a system or user turn: the string is in them.
    if prompt_is_string and all(completion[0]["role"] != "assistant" for completion in completions):
        return True
    return all(completion[: len(prompt)] == prompt for completion in completions)


def _shared_turns(completions: list[list[dict]]) -> int:
    """How many turns are the prompt.

    Of one conversation these are all turns before its first answer. Of two these are all turns before the last answer
    up to which both are equal.
    """
    answers = [n for n in range(min(map(len, completions))) if all(c[n]["role"] == "assistant" for c in completions)]
    same = [n for n in answers if all(c[:n] == completions[0][:n] for c in completions)]
    if not same:
        raise RowProblem("no shared prompt", "there is no assistant turn after turns that both completions share")
    return same[0] if len(completions) == 1 else same[-1]


def _up_to_last_answer(turns: list[dict]) -> list[dict]:
    """The turns up to the last answer. The turns after it are not scored, so they are left out."""
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise RowProblem("empty completion", "a completion has no assistant turn")
    last = turns[answers[-1]]
    content = last["content"]
    if (not content.strip() if isinstance(content, str) else not content) and set(last) <= {"role", "content"}:
        raise RowProblem("empty completion", "the last assistant turn holds no text")
    return turns[: answers[-1] + 1]


def _tools(row: dict) -> list | None:
    """The row's tool descriptions, which may be a list or the JSON text of a list."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowProblem("wrong type", f"'tools' is not valid JSON ({error!s:.60})") from error
    if not isinstance(tools, (list, type(None))):
        raise RowProblem("wrong type", f"'tools' must be a list, found {type(tools).__name__}")
    return _without_nulls(tools) or None


def _apply_template(tokenizer, tools: list | None, turns: list[dict], generation: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # a chat template is code from elsewhere and may raise anything
        raise RowProblem("chat template error", f"the chat template refuses it: {error!s:.120}") from error


def _render(prompt: list[dict], completions: list[list[dict]], template: Callable[..., str], eos: str) -> Example:
    """The texts of prompt and completions: what the chat template writes for them together, cut behind the prompt.

    The prompt's text should be what the template writes for generation, which ends where an answer starts. Some
    templates add more there (a tag that makes the model think, for example) than they write before an answer that is
    given. The prompt is cut without the generation prompt in that case, and the example is marked as a mismatch.

    Args:
        prompt: the turns of the prompt.
        completions: the turns of each completion.
        template: renders turns; a second argument says whether to add the generation prompt.
        eos: the tokenizer's EOS token as text.
    """
    wholes = [template(prompt + completion) for completion in completions]
    candidates = (template(prompt, generation) for generation in (True, False))
    start = next((text for text in candidates if all(whole.startswith(text) for whole in wholes)), None)
    if start is None:
        raise RowProblem("chat template error", "the template writes the prompt differently once an answer follows it")
    spans = [
        _answer_spans(prompt, completion, whole, len(start), template, eos)
        for completion, whole in zip(completions, wholes, strict=True)
    ]
    # Templates write a newline between turns; behind the last turn it belongs to nothing.
    texts = [whole.rstrip()[len(start) :] for whole in wholes]
    return Example(start, texts, spans, template_mismatch=start != template(prompt, True))


def _answer_spans(
    prompt: list[dict], completion: list[dict], whole: str, offset: int, template: Callable[..., str], eos: str
) -> list[tuple[int, int]] | None:
    """Where the assistant's turns are in `whole[offset:]`, end-of-turn included; None if there is just one turn.

    Only the assistant's turns are scored. Where a turn starts and ends is found by rendering the conversation up to it.
    """
    if len(completion) == 1:
        return None
    spans, turns = [], prompt + completion
    for n in range(len(prompt), len(turns)):
        if turns[n]["role"] == "assistant":
            start = _prefix_length(whole, (template(turns[:n], generation) for generation in (True, False)))
            spans.append((start - offset, _answer_end(whole, start, template(turns[: n + 1]), eos) - offset))
    return spans


def _prefix_length(whole: str, candidates: Iterable[str]) -> int:
    """The length of the first candidate that the text starts with."""
    for candidate in candidates:
        if whole.startswith(candidate):
            return len(candidate)
    raise RowProblem(*_REWRITTEN)


def _answer_end(whole: str, start: int, so_far: str, eos: str) -> int:
    """Where the answer that starts at `start` ends. `so_far` is the conversation rendered up to and including it."""
    if whole.startswith(so_far.rstrip()):
        return len(so_far.rstrip())
    # Some templates write an answer differently while it is the last one (with its thoughts, for example), so the
    # rendering is of no use. Look for the EOS that ends the answer.
    end = whole.find(eos, start)
    if end < 0:
        raise RowProblem(*_REWRITTEN)
    return end + len(eos)
