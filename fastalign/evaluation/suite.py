"""Suites: files of items that a model is measured on, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastalign.data.messages import RowProblem, read_messages
from fastalign.errors import DataError, InputError
from fastalign.evaluation.instructions import check_problem
from fastalign.options import nearest

Kind = Literal["choices", "answer", "checks", "tests"]
KINDS: tuple[Kind, ...] = ("choices", "tests", "checks", "answer")
LINE_BYTES = 1_000_000  # of an item: more is a broken file, since no prompt of that length fits into a model
SHIPPED = Path(__file__).parent / "suites"

_PROMPTS = ("prompt", "question", "instruction")  # the names of the column of prompts, the first one that is there


class Item(NamedTuple):
    """One question, and how its answer is judged.

    Attributes:
        id: The name of the item, which no other item of the suite has.
        category: What the summary groups items by.
        kind: Which of the next four fields judges the answer.
        prompt: A text, or the turns of a chat.
        choices: The options, of which the model's likeliest is its answer.
        label: The number of the right option, from 0 on.
        answer: The number or the words that the answer must hold.
        checks: Name -> value of the instructions that the answer must follow, see `evaluation/instructions.py`.
        tests: Python code that fails if the answer's code is wrong.
    """

    id: str
    category: str
    kind: Kind
    prompt: str | list[dict]
    choices: tuple[str, ...] = ()
    label: int = 0
    answer: str = ""
    checks: Mapping[str, Any] = {}
    tests: str = ""


@dataclass(frozen=True)
class Suite:
    """Items that a model is measured on.

    Attributes:
        name: The name of the suite in reports.
        items: Its items, at least one, whose ids differ.

    Examples:
        >>> suite = Suite.from_rows("sums", [{"id": "a", "prompt": "2 + 2 =", "choices": ["3", "4"], "label": 1}])
        >>> suite.items[0].choices
        ('3', '4')
    """

    name: str
    items: tuple[Item, ...]

    @classmethod
    def read(cls, path: str | Path) -> Suite:
        """The suite of a JSONL file, or one that fastalign ships, by its name.

        Args:
            path: A .jsonl file whose rows are as for `from_rows`; or the name of a shipped suite, such as "knowledge".

        Raises:
            DataError: The file cannot be read, a line is no JSON object or longer than 1 MB, or a row is no item.
        """
        file = Path(path).expanduser()
        if not file.exists() and (SHIPPED / f"{path}.jsonl").is_file():
            file = SHIPPED / f"{path}.jsonl"
        if not file.exists():
            shipped = sorted(other.stem for other in SHIPPED.glob("*.jsonl"))
            raise DataError(f"There is no suite {str(path)!r}: name a .jsonl file; {nearest(str(path), shipped)}")
        return cls.from_rows(file.stem, _rows(file))

    @classmethod
    def from_rows(cls, name: str, rows: list[dict[str, Any]]) -> Suite:
        """A suite of rows in memory.

        Args:
            name: The name of the suite.
            rows: Mappings with `prompt` (or `messages`) and one of

                - `choices` (a list of texts) with `label` (the number of the right one from 0 on, or its text)
                - `answer`, a number or a text
                - `checks`, a mapping of instructions to their values
                - `tests`, Python code

                `id` and `category` may be missing: the id is then the number of the row, the category the suite's name.

        Raises:
            DataError: A row is no item, two have the same id, or there is none.
        """
        items: dict[str, Item] = {}
        for number, row in enumerate(rows, start=1):
            try:
                item = _item(row, str(number), name)
            except (InputError, RowProblem) as problem:
                raise DataError(f"Item {number} of the suite {name}: {_sentence(problem)}.") from problem
            if item.id in items:
                raise DataError(f"Item {number} of the suite {name} has the id {item.id!r} of an item before it.")
            items[item.id] = item
        if not items:
            raise DataError(f"The suite {name} holds no item: it needs at least one line.")
        return cls(name, tuple(items.values()))


def shipped_suites() -> list[str]:
    """The names of the small suites that fastalign ships."""
    return sorted(path.stem for path in SHIPPED.glob("*.jsonl"))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, which is read line by line, so that a huge line is refused before it fills the memory."""
    rows = []
    try:
        with path.open("rb") as file:
            while line := file.readline(LINE_BYTES + 1):
                number = len(rows) + 1
                if len(line) > LINE_BYTES:
                    raise DataError(f"{path}: item {number} is longer than {LINE_BYTES:,} bytes: shorten or remove it.")
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{path}: item {number} is a {type(row).__name__}, not a JSON object.")
                rows.append(row)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: item {len(rows) + 1} is not valid JSON ({error}).") from error
    return rows


def _item(row: Mapping[str, Any], number: str, suite: str) -> Item:
    if isinstance(row.get("test"), str) and isinstance(row.get("entry_point"), str):  # HumanEval's columns
        row = {"id": row.get("task_id", number), "tests": f"{row['test']}\ncheck({row['entry_point']})", **row}
    kinds: list[Kind] = [kind for kind in KINDS if row.get(kind) not in (None, "", [], {})]
    if not kinds:
        raise InputError(f"nothing says what is right; give one of {', '.join(sorted(KINDS))}")
    kind = kinds[0]
    if len(kinds) > 1 and set(kinds) != {"choices", "answer"}:
        raise InputError(f"it has {' and '.join(kinds)}, and only one of them can judge the answer")
    item = Item(str(row.get("id", number)), str(row.get("category") or suite), kind, _prompt(row))
    if kind == "choices":
        choices = row["choices"]
        return item._replace(choices=_choices(choices), label=_label(row, choices))
    if kind == "answer":
        return item._replace(answer=_text("answer", row["answer"]))
    if kind == "tests":
        if not isinstance(row["tests"], str):
            raise InputError(f"tests is a {type(row['tests']).__name__}; expected Python code as text")
        return item._replace(tests=row["tests"])
    if problem := check_problem(row["checks"]):
        raise InputError(problem)
    return item._replace(checks=row["checks"])


def _prompt(row: Mapping[str, Any]) -> str | list[dict]:
    if row.get("messages") is not None:
        turns = read_messages(row["messages"], "user", "messages")
        if not turns or turns[-1]["role"] == "assistant":
            raise InputError("messages end with an answer; leave it out, since the model is to give it")
        return turns
    text = next((row[name] for name in _PROMPTS if row.get(name) is not None), None)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"prompt is {text!r}; expected a text that is not empty")
    return text


def _choices(choices: Any) -> tuple[str, ...]:
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) for text in choices):
        raise InputError(f"choices is {choices!r:.80}; expected a list of at least two texts")
    if not all(text.strip() for text in choices):
        raise InputError("one of its choices is empty, which has no probability")
    if len(set(choices)) < len(choices):
        raise InputError("two of its choices are the same text")
    return tuple(choices)


def _label(row: Mapping[str, Any], choices: list[str]) -> int:
    label = row.get("label")
    label = row.get("answer") if label is None else label
    if isinstance(label, str):
        if label not in choices:
            raise InputError(f"its answer {label!r:.60} is not among its {len(choices)} choices")
        return choices.index(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise InputError(f"label is {label!r}; expected 0 to {len(choices) - 1}, or the text of the right choice")
    return label


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise InputError(f"{name} is {value!r:.60}; expected a number or a text")
    return str(value)


def _sentence(problem: Exception) -> str:
    return f"{problem.kind}: {problem.detail}" if isinstance(problem, RowProblem) else str(problem)
