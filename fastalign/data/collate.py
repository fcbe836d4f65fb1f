"""From tokenised rows to micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset

from fastalign.data.batch import Batch
from fastalign.data.packing import Layout, PackedBatch, lay_out, pad_to_multiple
from fastalign.errors import DataError

# `lay_out` reads these columns. Every other column of a row becomes a tensor in `Batch.columns`.
_TOKENS = ("prompt_ids", "completion_ids", "completion_mask")


class Collator:
    """Makes a `Batch` of some tokenised rows: what `transformers.Trainer` calls a data collator.

    Args:
        layout: How the batch is laid out: "shared", "packed" or "padded" (see `fastalign.models.scoring.prepare`).
        pad_token_id: The token that fills padded rows.
        score_prompts: Score the tokens of the prompts too. Needs a packed layout.
        multiple: Make the length of a packed row a multiple of this number of tokens.
        device: Where the batches will go. For a GPU the index tensors of its attention are made here, on the CPU.
    """

    def __init__(
        self,
        layout: Layout,
        pad_token_id: int,
        *,
        score_prompts: bool = False,
        multiple: int = 1,
        device: torch.device | None = None,
    ):
        self.layout: Layout = layout
        self.on_gpu = device is not None and device.type == "cuda"
        self.pad_token_id, self.score_prompts, self.multiple = pad_token_id, score_prompts, multiple

    def __call__(self, rows: list[dict]) -> dict[str, Batch]:
        """The micro-batch of some rows, as the only entry of a dictionary: the Trainer expects a mapping."""
        packed, prompt_tokens = lay_out(rows, self.layout, self.pad_token_id), 0
        if self.score_prompts:
            packed, prompt_tokens = _with_prompts(packed, len(rows))
        packed = pad_to_multiple(packed, self.multiple)
        packed = packed.with_keys() if self.on_gpu else packed
        names = [name for name in rows[0] if name not in _TOKENS]
        columns = {name: torch.tensor([v for row in rows for v in _flat(row[name])]) for name in names}
        return {"batch": Batch(packed, columns, prompt_tokens, rows)}


def _flat(value: Any) -> Iterator[Any]:
    """The numbers of a row's column in order, be it one per row, one per completion or one per token."""
    if not isinstance(value, list):
        yield value
        return
    for item in value:
        yield from _flat(item)


def _with_prompts(packed: PackedBatch, rows: int) -> tuple[PackedBatch, int]:
    """The batch with the prompts' tokens scored behind those of the completions, and how many they are.

    The first token of a prompt is not scored: no token before it predicts it.
    """
    assert packed.layout is not None and packed.targets is not None, "only a packed row knows where its prompts lie"
    # A layout that does not share prompts has one group per completion. Each prompt must still count once.
    groups = packed.layout[:: len(packed.layout) // rows]
    positions = [i for group in groups for i in range(group.prompt[0], group.prompt[1] - 1)]
    index = torch.tensor(positions, dtype=torch.int64)  # (P,) positions that predict the next token of a prompt
    targets = packed.input_ids[0, index + 1]  # (P,)
    packed = replace(
        packed,
        score_index=torch.cat([packed.score_index, index]),
        targets=torch.cat([packed.targets, targets]),
    )
    return packed, index.numel()


def with_mismatched(dataset: Dataset) -> Dataset:
    """Adds to each row, as its second completion, the completion of the next row that has another prompt.

    KTO estimates its baseline from such mismatched pairs of prompt and completion (Ethayarajh et al. 2024,
    arXiv:2402.01306). After the last row the search goes on at the first.

    Args:
        dataset: Tokenised rows of one completion each.

    Returns:
        The data set with two completions per row.

    Raises:
        DataError: All rows have the same prompt.
    """
    rows = dataset.to_list()
    if all(row["prompt_ids"] == rows[0]["prompt_ids"] for row in rows):
        raise DataError(
            "The data set has one row or one prompt; KTO's baseline needs other prompts' completions: add some."
        )
    # From the last row to the first, `other` is the nearest row behind the current one that has another prompt. For the
    # last row the search starts over at the first row.
    other = next(row for row in rows if row["prompt_ids"] != rows[-1]["prompt_ids"])
    pairs = []
    for row, following in zip(reversed(rows), [other, *reversed(rows[1:])], strict=True):
        other = other if following["prompt_ids"] == row["prompt_ids"] else following
        extra = {name: [row[name][0], other[name][0]] for name in ("completion_ids", "completion_mask") if name in row}
        pairs.append({**row, **extra})
    return type(dataset).from_list(pairs[::-1], features=dataset.features)
