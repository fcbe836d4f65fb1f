"""Layouts of rows that hold answers or conversations in another shape than training needs, and what becomes of each.

`LAYOUTS` is read from top to bottom, and the first layout that fits is taken. Its converter turns one row into rows
with the columns of `fastalign.data.formats.FORMATS`. A layout that differs only in the names of its columns needs no
entry: these names are `ALIASES` in `fastalign.data.columns`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets

from fastalign.data import ranked, trees
from fastalign.data.columns import column_of, first_filled, optional_columns, refuse_changed_meaning, with_context
from fastalign.data.files import from_dicts
from fastalign.data.messages import RowProblem, holds_messages, read_messages
from fastalign.errors import DataError

BATCH_ROWS = 1000

# Converters: from the fields of one row to the rows that it gives


def _shp(row: dict) -> list[dict]:
    pair = ranked.of_two(row["human_ref_A"], row["human_ref_B"], row["labels"], (("1",), ("0",)))
    return [{"prompt": row["history"], **answers} for answers in pair]


def _openai_pair(row: dict) -> list[dict]:
    given = row["input"]
    if not isinstance(given, dict) or not given.get("messages"):
        raise RowProblem("wrong type", f"'input' must hold 'messages', found {given!r:.60}")
    answers = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return [{"prompt": given["messages"], **answers} | ({"tools": given["tools"]} if given.get("tools") else {})]


def _arena(row: dict) -> list[dict]:
    names = (("model_a", "a"), ("model_b", "b"))
    return ranked.of_two(row["conversation_a"], row["conversation_b"], row["winner"], names)


def _winner(row: dict) -> list[dict]:
    names = (("model_a", "response_a", "a"), ("model_b", "response_b", "b"))
    return ranked.of_two(row["response_a"], row["response_b"], row["winner"], names)


def _better_id(row: dict) -> list[dict]:
    return ranked.of_two(row["response_0"], row["response_1"], row["better_response_id"], (("0",), ("1",)))


def _preference(row: dict) -> list[dict]:
    return ranked.of_two(row["output_1"], row["output_2"], row["preference"], (("1",), ("2",)))


def _webgpt(row: dict) -> list[dict]:
    pair = ranked.with_values([row["answer_0"], row["answer_1"]], [row["score_0"], row["score_1"]])
    question = row["prompt"]["full_text"] if isinstance(row["prompt"], dict) else row["prompt"]
    return [{"prompt": question, **answers} for answers in pair]


def _labelled_messages(row: dict) -> list[dict]:
    turns = read_messages(row["messages"], "user", "messages")
    last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if not last:
        raise RowProblem("no prompt", "a labelled conversation needs an assistant turn behind another turn")
    return [{"prompt": turns[:last], "completion": [turns[last]], "label": row["label"]}]


def _with_history(row: dict) -> list[dict]:
    prompt, turns = with_context(row)["prompt"], []
    if not isinstance(prompt, str):
        raise RowProblem("wrong type", f"a prompt with 'history' must be a string, found {prompt!r:.60}")
    for exchange in row["history"] or []:
        if not isinstance(exchange, (list, tuple)) or len(exchange) != 2:
            raise RowProblem("wrong type", f"'history' must hold pairs of question and answer, found {exchange!r:.60}")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    turns.append({"role": "user", "content": prompt})
    if "completion" not in row or "label" in row:
        answers = {name: row[name] for name in ("chosen", "rejected", "completion", "label") if name in row}
        return [{"prompt": turns, **answers}]
    return [{"messages": [*turns, {"role": "assistant", "content": row["completion"]}]}]


def _alternating(row: dict) -> list[dict]:
    texts = row["turns"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowProblem("wrong type", f"'turns' must be a list of strings, found {texts!r:.60}")
    return [{"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}]


@dataclass(frozen=True)
class Layout:
    """One layout of rows.

    Attributes:
        name: what reports call it.
        fields: the fields that must be there. Their columns may have any of the names in `ALIASES`.
        gives: what its rows become: "pairs", "labelled" or "completions".
        convert: one of the converters above. It may give no row, where all answers are rated alike.
        rule: what the converter decides, for the report.
        fits: whether the first values of the fields are such that the rows have this layout. Without it the names of
            the columns decide.
        gather: joins rows of one message into rows of one conversation, as (number of a row, row).
        also: more fields that the converter reads where they are there.
    """

    name: str
    fields: tuple[str, ...]
    gives: str
    convert: Callable[[dict], list[dict]]
    rule: str = ""
    fits: Callable[[dict], bool] | None = None
    gather: Callable[[Iterable[tuple[int, dict]]], list[tuple[int, dict]]] | None = None
    also: tuple[str, ...] = ()


_EXPORT = ("message_id", "parent_id", "text", "role")
_REVIEW = ("rank", "deleted", "review_result")

LAYOUTS = (
    Layout("OpenAI preference", ("input", "preferred_output", "non_preferred_output"), "pairs", _openai_pair),
    Layout(
        "SHP", ("history", "human_ref_A", "human_ref_B", "labels"), "pairs", _shp,
        "labels 1 means that answer A is chosen",
    ),
    Layout(
        "two conversations and a winner", ("conversation_a", "conversation_b", "winner"), "pairs", _arena,
        "the winner is chosen, and a tie left out",
    ),
    Layout(
        "two answers and a winner", ("prompt", "response_a", "response_b", "winner"), "pairs", _winner,
        "the winner is chosen, and a tie left out",
    ),
    Layout(
        "two answers and the better one's number", ("prompt", "response_0", "response_1", "better_response_id"),
        "pairs", _better_id, "the better one is chosen",
    ),
    Layout(
        "two outputs and a preference", ("prompt", "output_1", "output_2", "preference"), "pairs", _preference,
        "the preferred one is chosen",
    ),
    Layout(
        "two answers with scores", ("prompt", "answer_0", "answer_1", "score_0", "score_1"), "pairs", _webgpt,
        ranked.RULE,
    ),
    Layout(
        "answers with ratings", ("prompt", "completions", "scores"), "pairs",
        lambda row: ranked.with_values(row["completions"], row["scores"]), ranked.RULE,
        lambda first: isinstance(first["completions"], list) and isinstance(first["scores"], list),
    ),
    Layout(
        "answers with ranks", ("prompt", "completions", "ranks"), "pairs",
        lambda row: ranked.with_values(row["completions"], row["ranks"], -1), ranked.RULE,
        lambda first: isinstance(first["completions"], list) and isinstance(first["ranks"], list),
    ),
    Layout(
        "rated answers", ("prompt", "completions"), "pairs", lambda row: ranked.rated(row["completions"]), ranked.RULE,
        lambda first: isinstance(first["completions"], list) and any(map(ranked.has_value, first["completions"])),
    ),
    Layout(
        "ranked answers", ("prompt", "ranked"), "pairs", lambda row: ranked.in_order(row["ranked"]),
        "the first answer is chosen, and the last rejected", lambda first: isinstance(first["ranked"], list),
    ),
    Layout(
        "tree of messages", ("prompt",), "pairs", trees.pairs, trees.PAIR_RULE,
        lambda first: trees.is_tree(first["prompt"]),
    ),
    Layout(
        "tree of messages", ("prompt",), "completions", trees.conversation, trees.CONVERSATION_RULE,
        lambda first: trees.is_tree(first["prompt"]),
    ),
    Layout("export of messages", _EXPORT, "pairs", trees.pairs, trees.PAIR_RULE, gather=trees.join, also=_REVIEW),
    Layout(
        "export of messages", _EXPORT, "completions", trees.conversation, trees.CONVERSATION_RULE, gather=trees.join,
        also=_REVIEW,
    ),
    Layout(
        "conversation with a label", ("messages", "label"), "labelled", _labelled_messages,
        "the label is that of the last answer", lambda first: holds_messages(first["messages"]),
    ),
    Layout("pair with history", ("prompt", "history", "chosen", "rejected"), "pairs", _with_history),
    Layout(
        "labelled instruction with history", ("prompt", "history", "completion", "label"), "labelled", _with_history,
    ),
    Layout("instruction with history", ("prompt", "history", "completion"), "completions", _with_history),
    Layout(
        "list of turns", ("turns",), "completions", _alternating, "the first turn is the user's",
        lambda first: isinstance(first["turns"], list) and all(isinstance(text, str) for text in first["turns"]),
    ),
)  # fmt: skip


@dataclass
class Converted:
    """The rows of a data set, with the columns of a format.

    Attributes:
        rows: the rows.
        name: the layout and its rule; empty if the rows are as they came.
        read: the columns that were read, by field.
        numbers: for each row the number of the row that it came from, counted from 1.
        problems: (row number, kind, detail) of each row that could not be converted.
        empty: the numbers of the rows that give no row.
        other: a layout that the rows have, but that does not give what is wanted.
    """

    rows: datasets.Dataset
    name: str = ""
    read: Mapping[str, str] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    problems: list[tuple[int, str, str]] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    other: Layout | None = None


def convert_rows(rows: datasets.Dataset, wanted: str | None = None) -> Converted:
    """The rows in a format that can be tokenised.

    Args:
        rows: rows of any layout. Those of none are returned as they are.
        wanted: what the rows are for: "pairs", "labelled", "completions" or None. It decides where several layouts
            fit, since a tree of messages may give pairs as well as conversations. Labelled rows can be made of pairs.

    Raises:
        DataError: a column would have to change the training of its rows but does not, or no row is left.
    """
    filled = {name: value for name in rows.column_names if (value := first_filled(rows, name)) is not None}
    found = [(layout, columns) for layout in LAYOUTS if (columns := _columns(layout, filled))]
    order = {"labelled": ("labelled", "pairs"), None: ("pairs", "labelled", "completions")}.get(wanted, (wanted,))
    layout, columns = next((pair for gives in order for pair in found if pair[0].gives == gives), (None, {}))
    if layout is None:
        return Converted(rows, other=found[0][0] if found else None)
    refuse_changed_meaning(rows, columns)
    converted, made = Converted(rows, _describe(layout, columns), columns), []
    numbered = _numbered(rows, columns)
    for number, row in layout.gather(numbered) if layout.gather else numbered:
        try:
            given = [_with_rest(item, row) for item in layout.convert(row)]
        except RowProblem as problem:
            converted.problems.append((number, problem.kind, problem.detail))
            continue
        made += given
        converted.numbers += [number] * len(given)
        if not given:
            converted.empty.append(number)
    if not made:
        why = converted.problems[0][2] if converted.problems else "no row has answers of different value"
        raise DataError(f"None of the {len(rows):,} rows is left (layout: {converted.name}): {why}.")
    converted.rows = from_dicts(made, "The converted rows")
    return converted


def _columns(layout: Layout, filled: dict) -> dict[str, str] | None:
    """From the fields of a layout, the optional ones included, to their columns; None if the layout does not fit."""
    if "chosen" not in layout.fields and all(column_of(name, filled) for name in ("chosen", "rejected")):
        return None  # somebody has chosen already
    columns: dict[str, str] = {}
    for name in layout.fields:
        column = column_of(name, [other for other in filled if other not in columns.values()])
        if column is None:
            return None
        columns[name] = column
    if layout.fits and not layout.fits({name: filled[column] for name, column in columns.items()}):
        return None
    more = {name: name for name in layout.also if name in filled}
    return columns | more | optional_columns(columns, filled)


def _numbered(rows: datasets.Dataset, columns: Mapping[str, str]) -> Iterator[tuple[int, dict]]:
    """The fields of each row, and its number, counted from 1."""
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        cells = zip(*(batch[column] for column in columns.values()), strict=True)
        for number, values in enumerate(cells, start=start + 1):
            yield number, dict(zip(columns, values, strict=True))


def _with_rest(item: dict, row: dict) -> dict:
    """A converted row, with the fields of the row that it came from: its prompt, system turn and tools."""
    names = ("system", "tools", "chat_template_kwargs")
    rest = {name: row[name] for name in names if row.get(name) is not None}
    if not {"prompt", "messages"} & {*item} and "prompt" in row:
        rest["prompt"] = with_context(row)["prompt"]
    return rest | item


def _describe(layout: Layout, columns: Mapping[str, Any]) -> str:
    renamed = [f"{name} from {column!r}" for name, column in columns.items() if name != column]
    return layout.name + (f" ({', '.join(renamed)})" if renamed else "") + (f": {layout.rule}" if layout.rule else "")
