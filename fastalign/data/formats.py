"""From a row in any of the common formats to one prompt text and its completion texts.

Plain strings are taken as they are. Chat messages go through the tokenizer's chat template. Either way a row becomes an
`Example`. A row that cannot become one raises `RowProblem`, and `fastalign.data.tokenize` collects these over the whole
data set, so that one error can name all bad rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import datasets

from fastalign.data.chat import Example, chat_example
from fastalign.data.columns import ALIASES, refuse_changed_meaning, sources, with_context
from fastalign.data.messages import RowProblem, holds_messages, read_json, read_messages
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
# What transcripts write before an answer.
_TURN_MARKER = re.compile(
    r"(?:^|\n)[ \t]*(?:#+[ \t]*)?(?:assistant|ai|bot|gpt|response|answer|a)[ \t]*:"
    r"|<\|assistant\|>\n?|<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
    r"|<start_of_turn>model\n|\[/INST\]",
    re.IGNORECASE,
)
_NO_PROMPT = (
    "the prompt is empty, or the two answers do not begin alike: put the question into a column 'prompt', or pass "
    "allow_empty_prompt=True to train without one"
)


@dataclass(frozen=True)
class Format:
    """The format of a data set.

    Attributes:
        name: a key of `FORMATS`.
        chat: whether the rows hold chat messages; otherwise they hold plain strings.
        sources: from each field that is read to the column that holds it. Fields are the columns of the format, and
            `system`, `context`, `tools` and `chat_template_kwargs` where the data set has them.
    """

    name: str
    chat: bool
    sources: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that rows of this format have."""
        return FORMATS[self.name]

    @property
    def gives(self) -> str:
        """What rows of this format are: "pairs", "labelled" or "completions"."""
        return "pairs" if "chosen" in self.columns else "labelled" if "label" in self.columns else "completions"

    def __str__(self) -> str:
        renamed = [f"{field} from {name!r}" for field, name in self.sources.items() if field != name]
        kind = "chat messages" if self.chat else "plain strings"
        return f"{self.name}, {kind}" + (f" ({', '.join(renamed)})" if renamed else "")


def detect_format(rows: datasets.Dataset) -> Format:
    """The format of a data set, from its columns and the first value in each.

    A column that is null in every row counts as missing. A field may have another name (see `ALIASES` in
    `fastalign.data.columns`). The rows hold chat messages if the first value of one of the format's columns does.

    Raises:
        DataError: the data set has the columns of no format, or a column that would change the meaning of its rows.
    """
    known = {*sum(FORMATS.values(), ()), *sum(ALIASES.values(), ())}
    names = [name for name in rows.column_names if name.lower() in known]
    first = {name: next((v for v in rows[name] if v is not None), None) for name in names}
    filled = {name: value for name, value in first.items() if value is not None}
    for name, columns in FORMATS.items():
        fields = sources(columns, filled)
        # Answers under another name give way to messages, which hold the whole conversation.
        if fields and not ("messages" in filled and fields.get("completion", "completion") != "completion"):
            refuse_changed_meaning(rows, fields)
            chat = name == "messages" or any(holds_messages(filled[fields[column]]) for column in columns)
            return Format(name, chat, fields)
    sets = "; ".join("/".join(columns) for columns in FORMATS.values())
    raise DataError(
        f"No known format: the data set has the columns {', '.join(rows.column_names) or '(none)'}, and one of these "
        f"sets must be there and filled: {sets}. Rename the columns to fit."
    )


def check_row(row: dict, fmt: Format) -> None:
    """Refuses what is wrong with a row by itself, which takes far less time than to render and tokenise it.

    Raises:
        RowProblem: as for `to_example`, for strings; for chat messages only what `read_messages` says of them.
    """
    if not fmt.chat:
        to_example(row, fmt, None, allow_empty_prompt=True)
        return
    for field in fmt.columns:
        value = row[fmt.sources[field]]
        if value is None:
            raise RowProblem("missing field", f"{fmt.sources[field]!r} is missing or null")
        if field == "label":
            _as_label(value)
            continue
        try:
            read_messages(value, "user" if field == "prompt" else "assistant", field)
        except RecursionError as error:
            raise _too_deep() from error


def to_example(row: dict, fmt: Format, tokenizer, allow_empty_prompt: bool = False) -> Example:
    """The row as an `Example`.

    Args:
        row: a row of the data set.
        fmt: the format of the data set.
        tokenizer: its chat template renders chat messages.
        allow_empty_prompt: whether a row may have an empty prompt.

    Raises:
        RowProblem: the row lacks a field, has a value of a wrong type or an empty completion, is a pair of equal
            completions, or cannot be rendered.
    """
    row = {field: row.get(name) for field, name in fmt.sources.items()}
    for column in fmt.columns:
        if row[column] is None:
            raise RowProblem("missing field", f"{fmt.sources[column]!r} is missing or null")
    row = with_context(row)
    try:
        example = (
            chat_example(row, fmt.columns, tokenizer, allow_empty_prompt)
            if fmt.chat
            else _string_example(row, fmt, allow_empty_prompt)
        )
    except RecursionError as error:
        raise _too_deep() from error
    if fmt.name == "unpaired":
        example.label = _as_label(row["label"])
    return example


def _too_deep() -> RowProblem:
    return RowProblem("wrong type", "its messages are nested too deeply")


def _as_label(value) -> bool:
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RowProblem("wrong type", f"'label' must be true or false, found {value!r:.60}")


# Plain strings


def _string_example(row: dict, fmt: Format, allow_empty_prompt: bool) -> Example:
    _check_strings(row, fmt)
    counts = Counter()
    prompt = row["prompt"] if "prompt" in fmt.columns else ""
    completions = [row[column] for column in fmt.columns if column not in ("prompt", "label")]
    if any(not text.strip() for text in completions):
        raise RowProblem("empty completion", "a completion holds no text")
    if len(completions) == 2:
        _refuse_identical(*completions)
    if fmt.name == "preference with implicit prompt":
        cut, counts = _implicit_prompt_length(*completions)
        prompt, completions = completions[0][:cut], [text[cut:] for text in completions]
    if fmt.name != "text" and not prompt.strip() and not allow_empty_prompt:
        raise RowProblem("no prompt", _NO_PROMPT)
    if (system := row.get("system")) and system.strip():
        prompt = f"{system}\n\n{prompt}"
    return Example(prompt, completions, [None] * len(completions), counts=counts)


def _check_strings(row: dict, fmt: Format) -> None:
    """Refuses cells that are no plain text, or need a chat template."""
    for field in ("tools", "chat_template_kwargs"):
        if read_json(row, field, object):
            raise RowProblem("unused column", f"{field!r} needs chat messages, and the row holds plain strings")
    for column in ("system", *fmt.columns):
        value = row.get(column, "")
        if column != "label" and not isinstance(value, str) and not (column == "system" and value is None):
            raise RowProblem("wrong type", f"{column!r} must be a string, found {type(value).__name__}")
        if isinstance(value, str) and holds_messages(value):
            raise RowProblem("wrong type", f"{column!r} holds messages, while the first row holds plain text")


def _implicit_prompt_length(chosen: str, rejected: str) -> tuple[int, Counter]:
    """How many characters of the text that both strings start with are the prompt, and what to count of it.

    - A transcript is cut behind the last marker of an assistant's turn, such as "Assistant:". Words that both answers
      begin with stay in the answers.
    - Other text is cut at the last space in what both share. A cut inside a word would give tokens that never occur in
      generation, and a cut after the space would separate the space from the word, although one token usually holds
      both. Each completion must have a word left.
    """
    # The last character that is no space stays in the completion: a blank completion would be an empty one.
    shared = min(len(chosen.rstrip()), len(rejected.rstrip())) - 1
    shared = next((n for n in range(shared) if chosen[n] != rejected[n]), shared)
    at_space = (
        cut
        for cut in range(shared, 0, -1)
        if not chosen[cut - 1].isspace() and chosen[cut].isspace() and rejected[cut].isspace()
    )
    space = next(at_space, 0)
    marker = max((match.end() for match in _TURN_MARKER.finditer(chosen, 0, shared)), default=0)
    if marker:
        return marker, Counter(shared_words=int(marker < space))
    return space, Counter(unmarked_prompts=int(space > 0))


def _refuse_identical(chosen, rejected) -> None:
    if chosen == rejected:
        raise RowProblem("identical pair", "chosen and rejected are the same")
