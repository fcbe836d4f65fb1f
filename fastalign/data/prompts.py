"""Prompts to answer: from a file or a string to chat turns, and to the tokens that generation starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalign.data.columns import ALIASES
from fastalign.data.encoding import special_prefix
from fastalign.data.loading import load_rows
from fastalign.data.messages import RowProblem, holds_messages, read_json, read_messages
from fastalign.data.template import Template
from fastalign.data.text import TEXT_SUFFIXES
from fastalign.errors import DataError


@dataclass
class Prompt:
    """One prompt: turns of a chat, or text.

    Attributes:
        content: messages with `role` and `content`, or a string that is no message yet.
        row: the row of the file that the prompt comes from.
    """

    content: list[dict] | str
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """What a person reads as the question: the text, or the last turn that holds words."""
        if isinstance(self.content, str):
            return self.content
        return next((str(turn["content"]) for turn in reversed(self.content) if turn.get("content")), "")


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file.

    Args:
        path: a text file (.txt, .md, .rst) with one prompt per line; or a .jsonl, .json, .parquet or .csv file with a
            column of prompts (`prompt` or a name that people give to it) or of `messages`. Of messages that end with
            an answer, the turns before it are the prompt.

    Raises:
        DataError: the file cannot be read, or has no such column, or a row of it holds no prompt.
    """
    path = Path(path)
    if path.suffix.lower() in TEXT_SUFFIXES:
        prompts = [Prompt(line) for line in _lines(path) if line.strip()]
    else:
        rows = load_rows(path)
        column = next((name for name in (*ALIASES["prompt"], *ALIASES["messages"]) if name in rows.column_names), None)
        if column is None:
            raise DataError(
                f"{path} has the columns {', '.join(rows.column_names)}, none of which holds prompts: call it 'prompt' "
                "or 'messages'."
            )
        prompts = [_of_row(row, column, number) for number, row in enumerate(rows.to_list(), start=1)]
    if not prompts:
        raise DataError(f"{path} holds no prompt.")
    return prompts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: convert it.") from error


def _of_row(row: dict, column: str, number: int) -> Prompt:
    value, system = row[column], row.get("system")
    try:
        if isinstance(value, str) and not holds_messages(value) and column != "messages":
            content: list[dict] | str = value
        else:
            content = read_messages(value, "user", column)
            if content[-1]["role"] == "assistant":
                content = content[:-1]
        if isinstance(system, str) and system.strip():
            turns = [{"role": "user", "content": content}] if isinstance(content, str) else content
            content = turns if turns and turns[0]["role"] == "system" else [_system(system), *turns]
    except RowProblem as problem:
        raise DataError(f"Row {number}: {problem.kind}: {problem.detail}.") from problem
    if not content or (isinstance(content, str) and not content.strip()):
        raise DataError(f"Row {number}: the prompt in column {column!r} is empty.")
    return Prompt(content, row)


def _system(text: str) -> dict:
    return {"role": "system", "content": text}


def encode_prompt(prompt: Prompt, tokenizer, *, plain: bool = False) -> list[int]:
    """The tokens that generation starts from, as in training: BOS exactly once, and no special token behind the prompt.

    Args:
        prompt: a string becomes a user's turn if the tokenizer has a chat template.
        tokenizer: the model's tokenizer.
        plain: strings stay plain text, which the model continues.

    Raises:
        DataError: the prompt holds turns, and the tokenizer has no chat template, or the template refuses them.
    """
    turns, options = prompt.content, {}
    if isinstance(turns, str) and tokenizer.chat_template and not plain:
        turns = [{"role": "user", "content": turns}]
    try:
        if isinstance(turns, str):
            text = turns
        elif not tokenizer.chat_template:
            raise DataError("The prompt holds chat messages, but the tokenizer has no chat template: give plain text.")
        else:
            options = read_json(prompt.row, "chat_template_kwargs", dict)
            text = Template(tokenizer, read_json(prompt.row, "tools", list), options)(turns, True)
    except RowProblem as problem:
        raise DataError(f"A prompt cannot be used: {problem.detail}.") from problem
    prefix = special_prefix(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not prefix or ids[: len(prefix)] == prefix:
        return ids
    return [*prefix, *ids]
