"""Rows that hold token ids already: which columns are read, and what is checked.

    prompt_ids, completion_ids            as `fastalign.data.tokenize` makes them, or with one flat list per row
    prompt_ids, chosen_ids, rejected_ids  pairs; also prompt_input_ids, chosen_input_ids, rejected_input_ids
    input_ids, labels                     as for transformers: a label of -100 is not scored
    input_ids, completion_mask            1 for tokens that are scored; also assistant_masks
    input_ids                             everything is scored

The tokens are taken as they are: no BOS and no EOS is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from fastalign.data.encoding import Tokens
from fastalign.data.messages import RowProblem

IGNORED = -100  # transformers' label of tokens that are not scored
NAMES = {
    "prompt": ("prompt_ids", "prompt_input_ids"),
    "completion": ("completion_ids", "completion_input_ids"),
    "chosen": ("chosen_ids", "chosen_input_ids"),
    "rejected": ("rejected_ids", "rejected_input_ids"),
    "ids": ("input_ids",),
    "labels": ("labels",),
    "mask": ("completion_mask", "assistant_masks"),
    "label": ("label",),
    "attention": ("attention_mask",),
}
# The fields of each form, and those that are read where they are there. The first form that fits is taken.
_FORMS = (
    (("prompt", "chosen", "rejected"), ()),
    (("prompt", "completion"), ("mask", "label")),
    (("ids", "labels"), ("attention",)),
    (("ids", "mask"), ("attention",)),
    (("ids",), ("attention",)),
)


@dataclass(frozen=True)
class TokenFormat:
    """The format of rows of token ids, with the attributes of `fastalign.data.formats.Format`.

    Attributes:
        gives: "pairs", "labelled" or "completions".
        sources: from each field that is read to its column.
        completions: how many completions each row has.
    """

    gives: str
    sources: Mapping[str, str]
    completions: int = 1
    name = "tokens"
    chat = False

    def __str__(self) -> str:
        return f"tokens of {self.gives} ({', '.join(self.sources.values())})"


def token_format(rows: datasets.Dataset) -> TokenFormat | None:
    """The format of rows of token ids; None if the rows hold none."""
    for needed, optional in _FORMS:
        columns = {field: _column(field, rows.column_names) for field in (*needed, *optional)}
        found = {field: name for field, name in columns.items() if name is not None}
        if not all(field in found for field in needed):
            continue
        gives = "pairs" if "chosen" in found else "labelled" if "label" in found else "completions"
        count = 2 if gives == "pairs" else 1
        if gives == "completions" and "completion" in found:
            count = _completions(rows[0][found["completion"]])
            gives = "pairs" if count == 2 else gives
        return TokenFormat(gives, found, count)
    return None


def _column(field: str, names: Collection[str]) -> str | None:
    return next((name for name in NAMES[field] if name in names), None)


def _completions(cell: Any) -> int:
    """How many completions a cell holds: a list of token ids is one."""
    return len(cell) if isinstance(cell, list) and cell and isinstance(cell[0], list) else 1


def read_tokens(row: dict, fmt: TokenFormat, vocabulary: int, eos: int) -> tuple[Tokens, bool | None]:
    """The tokens of a row, and its label.

    Args:
        row: a row of the data set.
        fmt: the format of the data set.
        vocabulary: how many tokens there are; each id must be smaller.
        eos: the token that should end each completion. Those without it are counted.

    Raises:
        RowProblem: a list does not hold token ids, a mask has another length, or nothing is scored.
    """
    row = {field: row[name] for field, name in fmt.sources.items()}
    prompt, completions, masks = _by_ids(row) if "ids" in row else _by_completion(row)
    counts = Counter()
    if len(completions) != fmt.completions:
        raise RowProblem(
            "wrong number of completions", f"has {len(completions)} completions, where {fmt.completions} are expected"
        )
    for ids in (prompt, *completions):
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocabulary for token in ids):
            raise RowProblem("wrong token", f"token ids must be integers from 0 to {vocabulary - 1}, found {ids!r:.60}")
    for ids, mask in zip(completions, masks, strict=True):
        if not isinstance(mask, list) or len(mask) != len(ids) or not {*mask} <= {0, 1}:
            raise RowProblem("wrong mask", f"a mask must hold 0 or 1 for each of {len(ids)} tokens, found {mask!r:.60}")
        # Nothing predicts the first token of a row.
        if not any(mask[not prompt :]):
            raise RowProblem("empty completion", "no token of a completion is scored")
        counts["eos_present" if ids[-1] == eos else "eos_missing"] += 1
    counts["masked"] = int(any(0 in mask for mask in masks))
    return Tokens(prompt, completions, masks, counts), row.get("label")


def _by_completion(row: dict) -> tuple[Any, list, list]:
    prompt = row["prompt"] or []
    if "chosen" in row:
        completions = [row["chosen"], row["rejected"]]
        if prompt and all(isinstance(ids, list) and ids[: len(prompt)] == prompt for ids in completions):
            raise RowProblem(
                "repeated prompt", "both completions begin with the prompt's tokens: leave these out there"
            )
    else:
        completions = row["completion"] if _is_nested(row["completion"]) else [row["completion"]]
    masks = row.get("mask")
    if masks is not None and not _is_nested(masks):
        masks = [masks]
    if masks is None:
        masks = [[1] * len(ids or []) for ids in completions]
    if len(masks) != len(completions):
        raise RowProblem("wrong mask", f"{len(masks)} masks for {len(completions)} completions")
    return prompt, completions, masks


def _is_nested(cell: Any) -> bool:
    return isinstance(cell, list) and bool(cell) and isinstance(cell[0], list)


def _by_ids(row: dict) -> tuple[Any, list, list]:
    """Prompt and completion of one list of tokens: the completion goes from the first scored token to the last."""
    ids, given = row["ids"], row.get("labels") or row.get("mask")
    attention = row.get("attention")
    if not isinstance(ids, list) or any(cells is not None and len(cells) != len(ids) for cells in (given, attention)):
        raise RowProblem("wrong mask", "input_ids must be a list, and labels or masks as long as it is")
    if given is None:
        scored = [1] * len(ids)
    elif "labels" in row:
        scored = [int(label != IGNORED) for label in given]
        if any(keep and label != token for keep, label, token in zip(scored, given, ids, strict=True)):
            raise RowProblem(
                "wrong label", f"a label must be its token of input_ids, or {IGNORED}: labels are not shifted"
            )
    else:
        scored = list(given)
    if attention is not None:  # padding is left out
        kept = [n for n, seen in enumerate(attention) if seen]
        ids, scored = [ids[n] for n in kept], [scored[n] for n in kept]
    places = [n for n, keep in enumerate(scored) if keep]
    if not places:
        raise RowProblem("empty completion", "no token is scored")
    part = slice(places[0], places[-1] + 1)
    return ids[: places[0]], [ids[part]], [scored[part]]
