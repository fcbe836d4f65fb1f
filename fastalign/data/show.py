"""Rows as they are trained, with the scored parts of their text told apart; and rows as they were understood."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import datasets

from fastalign.data.columns import with_context
from fastalign.data.formats import detect_format
from fastalign.data.layouts import convert_rows
from fastalign.data.messages import RowProblem

Part = tuple[str, bool]  # text, and whether it is scored


def trained_parts(row: dict, tokenizer) -> dict[str, list[Part]]:
    """The texts of a tokenised row: "prompt", and its completions by their names.

    Args:
        row: a row as `fastalign.data.tokenize` makes it.
        tokenizer: the tokenizer that made it. The texts are what it makes of the token ids, special tokens included.

    Returns:
        For each text its parts in order. Nothing of a prompt is scored.
    """
    completions = row["completion_ids"]
    masks = row.get("completion_mask") or [[1] * len(ids) for ids in completions]
    names = ["chosen", "rejected"] if len(completions) == 2 else ["completion"]
    texts = {"prompt": _parts(row["prompt_ids"], [0] * len(row["prompt_ids"]), tokenizer)}
    for name, ids, mask in zip(names, completions, masks, strict=True):
        # Nothing predicts the first token of a row.
        texts[name] = _parts(ids, mask if row["prompt_ids"] else [0, *mask[1:]], tokenizer)
    return texts


def _parts(ids: list[int], mask: list[int], tokenizer) -> list[Part]:
    parts, seen, before = [], [], ""
    for scored, group in groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1])):
        seen += [token for token, _ in group]
        # A part is what its tokens add to the text: some tokenizers leave out a space at the start of a text.
        text = tokenizer.decode(seen)
        shared = next((n for n, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
        parts.append((text[shared:], scored))
        before = text
    return parts


def understood_rows(rows: datasets.Dataset, wanted: str | None = None) -> Iterator[dict]:
    """The rows with the columns of their format, as they were understood. Rows that cannot be converted are left out.

    Args:
        rows: rows of any layout.
        wanted: as for `fastalign.data.tokenize`.

    Raises:
        DataError: the rows have no known format.
    """
    converted: Any = convert_rows(rows, wanted).rows
    fmt = detect_format(converted)
    for row in converted.select_columns([*fmt.sources.values()]):
        fields = {field: row[name] for field, name in fmt.sources.items()}
        for name in ("tools", "chat_template_kwargs"):  # the table holds them as JSON text
            if isinstance(fields.get(name), str):
                fields[name] = json.loads(fields[name])
        try:
            fields = with_context(fields)
        except RowProblem:  # tokenising names it
            continue
        yield {name: value for name, value in fields.items() if name != "context" and value is not None}
