"""Chat messages to one prompt text and its completion texts, with the ranges of characters that are scored.

A chat template is code from elsewhere, and it may leave things out or write a turn differently once another one
follows. So everything here is found by rendering conversations and comparing the texts, never by reading the template.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

from fastalign.data.messages import RowProblem, read_json, read_messages

_REWRITTEN = ("chat template error", "the template rewrites earlier turns: keep one assistant turn per row")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a turn that hold what the model thought
_PLACEHOLDER = "fastalign-answer"


@dataclass
class Example:
    """One prompt and its completions as text.

    Attributes:
        prompt: the text of the prompt; empty for plain text.
        completions: the texts of the completions, chosen before rejected.
        spans: for each completion the ranges of its characters that are scored, or None if all of it is scored.
        label: of an unpaired row, whether the completion is desirable.
        template_mismatch: whether the chat template's answers start differently than its generation prompt does.
        counts: what else this example adds to the fields of `DataReport`.
    """

    prompt: str
    completions: list[str]
    spans: list[list[tuple[int, int]] | None]
    label: bool | None = None
    template_mismatch: bool = False
    counts: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer, with the tools and options of one row."""

    tokenizer: object
    tools: list | None = None
    options: dict | None = None

    def __call__(self, turns: list[dict], generation: bool = False) -> str:
        """The text of some turns, with the beginning of an answer behind them if `generation`."""
        turns = [{key: value for key, value in turn.items() if key != "train"} for turn in turns]
        try:
            return self._render(turns, generation)
        except Exception as error:  # a chat template is code from elsewhere and may raise anything
            raise RowProblem("chat template error", f"the chat template refuses it: {error!s:.120}") from error

    def _render(self, turns: list[dict], generation: bool) -> str:
        return self.tokenizer.apply_chat_template(  # pyright: ignore[reportAttributeAccessIssue]  # any tokenizer
            turns, tools=self.tools, tokenize=False, add_generation_prompt=generation, **(self.options or {})
        )


def chat_example(row: dict, columns: tuple[str, ...], tokenizer) -> Example:
    """The row, whose cells hold chat messages, as an `Example`.

    Args:
        row: the values of the row by field.
        columns: the fields of its format.
        tokenizer: its chat template renders the messages.

    Raises:
        RowProblem: the row cannot be rendered, or not without losing what its answers hold.
    """
    prompt = read_messages(row["prompt"], "user", "prompt") if "prompt" in columns else []
    names = [column for column in columns if column not in ("prompt", "label")]
    completions = [read_messages(row[name], "assistant", name) for name in names]
    if len(completions) == 2 and completions[0] == completions[1]:
        raise RowProblem("identical pair", "chosen and rejected are the same")
    if _repeats_prompt(prompt, _is_one_turn(row.get("prompt"), prompt), completions):
        prompt = []
    if not prompt or any(completion[0]["role"] != "assistant" for completion in completions):
        shared = _shared_turns(completions)
        prompt = prompt + completions[0][:shared]
        completions = [completion[shared:] for completion in completions]
    prompt = _with_system(prompt, row.get("system"))
    if not prompt:
        raise RowProblem("no prompt", "the first turn is an assistant's: put a user or system turn before it")
    completions = [_up_to_last_answer(completion) for completion in completions]
    template = Template(tokenizer, read_json(row, "tools", list), read_json(row, "chat_template_kwargs", dict))
    return _render(prompt, completions, template)


def _is_one_turn(cell, prompt: list[dict]) -> bool:
    """Whether the prompt's cell is plain text, which became one message."""
    return isinstance(cell, str) and len(prompt) == 1 and prompt[0].get("content") == cell


def _with_system(prompt: list[dict], system) -> list[dict]:
    """The prompt behind a system turn that a column of its own holds."""
    if not isinstance(system, (str, type(None))):
        raise RowProblem("wrong type", f"'system' must be a string, found {type(system).__name__}")
    if not system or not system.strip():
        return prompt
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"] != system:
            raise RowProblem("two system turns", "the messages begin with another system turn than the column holds")
        return prompt
    return [{"role": "system", "content": system}, *prompt]


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


def _is_scored(turn: dict) -> bool:
    return turn["role"] == "assistant" and turn.get("train", True)


def _up_to_last_answer(turns: list[dict]) -> list[dict]:
    """The turns up to the last answer that is scored. The turns after it are left out: nothing there is scored."""
    answers = [n for n, turn in enumerate(turns) if _is_scored(turn)]
    if not answers:
        raise RowProblem("empty completion", "a completion has no assistant turn that is scored")
    last = turns[answers[-1]]
    content = last["content"]
    if (not content.strip() if isinstance(content, str) else not content) and set(last) <= {"role", "content"}:
        raise RowProblem("empty completion", "the last assistant turn holds no text")
    return turns[: answers[-1] + 1]


def _render(prompt: list[dict], completions: list[list[dict]], template: Template) -> Example:
    """The texts of prompt and completions: what the chat template writes for them together, cut behind the prompt.

    The prompt's text should be what the template writes for generation, which ends where an answer starts. Some
    templates add more there (a tag that makes the model think, for example) than they write before an answer that is
    given. The prompt then ends where the two texts part, and the example is marked as a mismatch.
    """
    wholes = [template(prompt + completion) for completion in completions]
    start = _answer_start(wholes, prompt, template)
    if start is None:
        raise RowProblem("chat template error", "the template writes the prompt differently once an answer follows it")
    spans = [
        _answer_spans(prompt, completion, whole, start, template)
        for completion, whole in zip(completions, wholes, strict=True)
    ]
    # Templates write a newline between turns; behind the last turn it belongs to nothing.
    texts = [whole.rstrip()[start:] for whole in wholes]
    head = wholes[0][:start]
    return Example(head, texts, spans, template_mismatch=head != template(prompt, True))


def _answer_start(wholes: list[str], turns: list[dict], template: Template) -> int | None:
    """Where the answer behind some turns starts in texts that go on behind it; None if they write the turns otherwise.

    Text that the generation prompt shares with every answer is not a part of the answer.
    """
    generation, plain = template(turns, True), template(turns)
    if all(whole.startswith(generation) for whole in wholes):
        return len(generation)
    if not all(whole.startswith(plain) for whole in wholes):
        return None
    return max(len(plain), min(_shared_length(generation, whole, template.tokenizer) for whole in wholes))


def _answer_spans(
    prompt: list[dict], completion: list[dict], whole: str, offset: int, template: Template
) -> list[tuple[int, int]] | None:
    """Where the scored turns are in `whole[offset:]`, end-of-turn included; None if there is just one turn."""
    if len(completion) == 1:
        return None
    spans, turns = [], prompt + completion
    for n in range(len(prompt), len(turns)):
        if _is_scored(turns[n]):
            start = _answer_start([whole], turns[:n], template)
            if start is None:
                raise RowProblem(*_REWRITTEN)
            last = n == len(turns) - 1
            end = len(whole.rstrip()) if last else _answer_end(whole, start, turns[: n + 1], template)
            spans.append((start - offset, end - offset))
    return spans


def _answer_end(whole: str, start: int, turns: list[dict], template: Template) -> int:
    """Where the answer that starts at `start` ends. It is the last of `turns`, but others follow it in the text."""
    so_far = template(turns).rstrip()
    if whole.startswith(so_far):
        return len(so_far)
    # The template writes an answer differently while it is the last one: with its thoughts, or with an EOS that ends
    # the whole conversation. Then the answer ends with the text that ends every answer.
    content = turns[-1]["content"]
    words = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
    at = whole.find(words, start)
    behind = max(at, start) + len(words) if at >= 0 else start
    stop = stop_text(template)
    if stop and (end := whole.find(stop, behind)) >= 0:
        return end + len(stop)
    if words and at >= 0 and not stop:
        return behind
    raise RowProblem(*_REWRITTEN)


# What the template writes behind an answer


def stop_text(template: Template) -> str:
    """The special token that the chat template writes behind every answer, the last or not; empty if there is none."""
    return _stop_text(template.tokenizer, str(template.tokenizer.chat_template))  # pyright: ignore[reportAttributeAccessIssue]


@lru_cache(maxsize=8)
def _stop_text(tokenizer, chat_template: str) -> str:
    """Found with a conversation of its own: what follows an answer, whether a question or another answer comes next.

    ... <|assistant|> ANSWER <|end|> <|user|> ...       both go on with <|end|>, and then they part
    ... <|assistant|> ANSWER <|end|> <|assistant|>
    """
    template, answer = Template(tokenizer), "placeholder"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        texts = [template(turns, True), template([*turns, {"role": "user", "content": "more"}])]
    except RowProblem:
        return tokenizer.eos_token
    first, second = (text.partition(answer)[2] for text in texts)
    shared = first[: _shared_length(first, second, tokenizer)]
    match = _special_tokens(tokenizer, chat_template).search(shared)
    return match[0] if match else ""


@lru_cache(maxsize=8)
def _special_tokens(tokenizer, chat_template: str) -> re.Pattern:
    """Matches the tokenizer's special tokens, longer ones first. A new chat template goes with a new entry."""
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)))


def _shared_length(one: str, other: str, tokenizer) -> int:
    """How many characters two texts share at their beginning, where no special token is cut in two."""
    shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    for text in (one, other):
        for match in _special_tokens(tokenizer, str(tokenizer.chat_template)).finditer(text):
            if match.start() < shared < match.end():
                shared = match.start()
    return shared
