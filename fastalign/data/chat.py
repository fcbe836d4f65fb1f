"""Chat messages to one prompt text and its completion texts, with the ranges of characters that are scored.

A chat template is code from elsewhere, and it may leave things out or write a turn differently once another one
follows. So everything here is found by rendering conversations and comparing the texts, never by reading the template.

Words used here:

- an *answer*: one assistant turn
- a *completion*: the turns after the prompt; it may hold several answers, with user turns between them
- a *whole*: the text of a conversation, prompt and completion, as the template writes it
- the *generation* text: the prompt as the template writes it when the model shall answer
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fastalign.data.answers import missing_parts, refuse_ignored_tools, whole_text, writes_thoughts_elsewhere
from fastalign.data.messages import RowProblem, read_json, read_messages
from fastalign.data.template import Template, shared_length, stop_text

_REWRITTEN = ("chat template error", "the template rewrites earlier turns: keep one assistant turn per row")
_PROMPT_REWRITTEN = (
    "chat template error", "the template writes the prompt differently once an answer follows it"
)  # fmt: skip


@dataclass
class Example:
    """One prompt and its completions as text.

    Attributes:
        prompt: the text of the prompt; empty for plain text.
        completions: the texts of the completions, chosen before rejected.
        spans: for each completion the ranges of its characters that are scored, or None if all of it is scored.
        label: of an unpaired row, whether the completion is desirable.
        template_mismatch: whether `prompt` is another text than the chat template writes for generation.
        counts: what else this example adds to the fields of `DataReport`.
    """

    prompt: str
    completions: list[str]
    spans: list[list[tuple[int, int]] | None]
    label: bool | None = None
    template_mismatch: bool = False
    counts: Counter = field(default_factory=Counter)


def chat_example(row: dict, columns: tuple[str, ...], tokenizer, allow_empty_prompt: bool = False) -> Example:
    """The row, whose cells hold chat messages, as an `Example`.

    Args:
        row: the values of the row by field.
        columns: the fields of its format.
        tokenizer: its chat template renders the messages.
        allow_empty_prompt: whether the turns before the first answer may all be blank.

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
    # Turns of the completions that belong to the prompt: the question, or what two conversations have in common.
    if not prompt or any(completion[0]["role"] != "assistant" for completion in completions):
        shared = _shared_turns(completions)
        prompt = prompt + completions[0][:shared]
        completions = [completion[shared:] for completion in completions]
    prompt = _with_system(prompt, row.get("system"))
    if not prompt:
        raise RowProblem("no prompt", "the first turn is an assistant's: put a user or system turn before it")
    if not allow_empty_prompt and not any(_holds_something(turn) for turn in prompt):
        raise RowProblem(
            "no prompt", "the turns before the answer are empty: pass allow_empty_prompt=True to keep them"
        )
    completions = [_up_to_last_answer(completion) for completion in completions]
    template = Template(tokenizer, read_json(row, "tools", list), read_json(row, "chat_template_kwargs", dict))
    return _render(prompt, completions, template)


def _holds_something(turn: dict) -> bool:
    content = turn["content"]
    return bool(content.strip() if isinstance(content, str) else content) or bool(turn.get("tool_calls"))


def _is_one_turn(cell, prompt: list[dict]) -> bool:
    """Whether the prompt's cell is plain text, which became one message."""
    return isinstance(cell, str) and len(prompt) == 1 and prompt[0].get("content") == cell


def _with_system(prompt: list[dict], system) -> list[dict]:
    """The prompt with the system turn in front of it that another column holds."""
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
    """Whether the completions are whole conversations, which repeat the prompt.

    A prompt that is a string and conversations that start with a system or user turn are two sources for the same
    words. The string must then be in one of the turns before each answer, else it would be lost.
    """
    if prompt_is_string and all(completion[0]["role"] != "assistant" for completion in completions):
        if not all(_is_in(prompt[0]["content"], completion[:-1]) for completion in completions):
            raise RowProblem(
                "two prompts", "the prompt is not in the conversations, which begin with another question: keep one"
            )
        return True
    return all(completion[: len(prompt)] == prompt for completion in completions)


def _is_in(text: str, turns: list[dict]) -> bool:
    """Whether one of the turns holds the text."""
    return any(isinstance(turn["content"], str) and text.strip() in turn["content"] for turn in turns)


def _shared_turns(completions: list[list[dict]]) -> int:
    """How many turns are the prompt.

    - Of one conversation, the turns before its first answer.
    - Of two, the turns that both have in common, up to the last place where an answer follows in both. Where they
      differ in the third answer, the prompt holds the first two questions, their answers, and the third question.
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
    """The texts of prompt and completions: what the chat template writes for them together, cut after the prompt.

    The prompt's text should be what the template writes for generation, which ends where an answer starts. Some
    templates add more there (a tag that makes the model think, for example) than they write before an answer that is
    given. The prompt then ends where the two texts part, and the example is marked as a mismatch.
    """
    counts = Counter()
    wholes = [template(prompt + completion) for completion in completions]
    for whole, completion in zip(wholes, completions, strict=True):
        refuse_ignored_tools(whole, prompt + completion, template)
    generation = template(prompt, True)
    start = _answer_start(wholes, generation, prompt, template)
    if start is None and prompt[0]["role"] == "system" and all(len(completion) == 1 for completion in completions):
        wholes = [generation + _answer_without_system(prompt, completion, template) for completion in completions]
        start = len(generation)
    if start is not None:
        wholes = [
            _whole_last_answer(whole, start, prompt, completion, template, counts)
            for whole, completion in zip(wholes, completions, strict=True)
        ]
        start = _answer_start(wholes, generation, prompt, template)
    if start is None:
        raise RowProblem(*_PROMPT_REWRITTEN)
    spans = [
        _answer_spans(prompt, completion, whole, start, template, counts)
        for completion, whole in zip(completions, wholes, strict=True)
    ]
    counts["foreign_thoughts"] += sum(_has_foreign_thoughts(completion, template) for completion in completions)
    # Templates write a newline between turns. After the last turn it belongs to nothing.
    texts = [whole.rstrip()[start:] for whole in wholes]
    head = wholes[0][:start]
    return Example(head, texts, spans, template_mismatch=head != generation, counts=counts)


def _has_foreign_thoughts(completion: list[dict], template: Template) -> bool:
    """Whether a scored answer has its thoughts in <think>, while the template writes thoughts in another way."""
    written = any("</think>" in str(turn["content"]) for turn in completion if _is_scored(turn))
    return written and writes_thoughts_elsewhere(template)


def _answer_without_system(prompt: list[dict], completion: list[dict], template: Template) -> str:
    """What the template writes for an answer when no system turn stands before it.

    Some templates write the system's words into the last question, and only while no answer follows it. The model sees
    them there in generation, so the answer is put after that text.
    """
    turns = prompt[1:]
    whole = template(turns + completion) if turns else ""
    start = _answer_start([whole], template(turns, True), turns, template) if turns else None
    if start is None:
        raise RowProblem(*_PROMPT_REWRITTEN)
    return whole[start:]


def _whole_last_answer(
    whole: str, start: int, prompt: list[dict], completion: list[dict], template: Template, counts: Counter
) -> str:
    """The text of a conversation, with what the template leaves out of its last answer; `start` is its first one's."""
    turns = prompt + completion
    if len(completion) > 1:
        start = _start_in([whole], turns[:-1], template)
    return whole_text(whole, start, turns, template, counts)


def _start_in(wholes: list[str], turns: list[dict], template: Template) -> int:
    start = _answer_start(wholes, template(turns, True), turns, template)
    if start is None:
        raise RowProblem(*_REWRITTEN)
    return start


def _answer_start(wholes: list[str], generation: str, turns: list[dict], template: Template) -> int | None:
    """Where in each text the answer after `turns` starts; None if a text begins otherwise than the turns do alone.

    Text that the generation prompt shares with every answer is not a part of the answer.

    Args:
        wholes: the texts of conversations that begin with `turns` and go on with an answer.
        generation: what the template writes for the turns, with the generation prompt.
        turns: the turns before the answer.
        template: the chat template.
    """
    if all(whole.startswith(generation) for whole in wholes):
        return len(generation)
    plain = template(turns)
    if not all(whole.startswith(plain) for whole in wholes):
        return None
    return max(len(plain), min(shared_length(generation, whole, template.tokenizer) for whole in wholes))


def _answer_spans(
    prompt: list[dict], completion: list[dict], whole: str, offset: int, template: Template, counts: Counter
) -> list[tuple[int, int]] | None:
    """Where the scored turns are in `whole[offset:]`, end-of-turn included; None if there is just one turn.

    Earlier answers from which the template left out words, and those without a stop token, are added to `counts`, which
    the report on the data shows.
    """
    if len(completion) == 1:
        return None
    spans, turns = [], prompt + completion
    for n in range(len(prompt), len(turns)):
        if not _is_scored(turns[n]):
            continue
        start = _start_in([whole], turns[:n], template)
        if n == len(turns) - 1:
            end = len(whole.rstrip())
        else:
            end = _answer_end(whole, start, turns[: n + 1], template)
            counts["answers_cut"] += bool(missing_parts(turns[n], whole[start:end]))
            counts["unstopped_answers"] += not stop_text(template)
        spans.append((start - offset, end - offset))
    return spans


def _answer_end(whole: str, start: int, turns: list[dict], template: Template) -> int:
    """Where the answer that starts at `start` ends. `turns` end with it, while `whole` holds the turns after it too."""
    so_far = template(turns).rstrip()
    if whole.startswith(so_far):
        return len(so_far)
    # The template writes an answer differently while it is the last one: with its thoughts, or with an EOS that ends
    # the conversation. Then the answer ends with the text that ends every answer.
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
