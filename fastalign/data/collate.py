"""From tokenised rows to micro-batches."""

from __future__ import annotations

from dataclasses import replace

import torch
from datasets import Dataset

from fastalign.data.batch import Batch
from fastalign.data.packing import PackedBatch, lay_out, pad_to_multiple
from fastalign.errors import DataError


class Collator:
    """Tokenised rows to a `Batch`, packed ones of a multiple of so many tokens."""

    def __init__(self, layout: str, pad_token_id: int, *, score_prompts: bool = False, multiple: int = 1):
        self.layout, self.pad_token_id, self.score_prompts = layout, pad_token_id, score_prompts
        self.multiple = multiple

    def __call__(self, rows: list[dict]) -> dict[str, Batch]:
        packed, prompt_tokens = lay_out(rows, self.layout, self.pad_token_id), 0
        if self.score_prompts:
            packed, prompt_tokens = _with_prompts(packed, len(rows))
        packed = pad_to_multiple(packed, self.multiple)
        reference = desirable = None
        if "ref_logprobs" in rows[0]:
            reference = torch.tensor([v for row in rows for values in row["ref_logprobs"] for v in values])
        if "label" in rows[0]:
            desirable = torch.tensor([row["label"] for row in rows])
        return {"batch": Batch(packed, reference, desirable, prompt_tokens, rows)}


def _with_prompts(packed: PackedBatch, rows: int) -> tuple[PackedBatch, int]:
    """The batch with every row's prompt tokens scored too, behind the completions' tokens, and their number."""
    groups = packed.layout[:: len(packed.layout) // rows]  # a prompt laid out for each completion counts once
    positions = [i for group in groups for i in range(group.prompt[0], group.prompt[1] - 1)]
    index = torch.tensor(positions, dtype=torch.int64)
    targets = packed.input_ids[0, index + 1]
    packed = replace(
        packed,
        score_index=torch.cat([packed.score_index, index]),
        targets=torch.cat([packed.targets, targets]),
    )
    return packed, index.numel()


def with_mismatched(dataset: Dataset) -> Dataset:
    """Each row with the completion of the next row of another prompt as its second one, for KTO's baseline."""
    rows = list(dataset)
    if all(row["prompt_ids"] == rows[0]["prompt_ids"] for row in rows):
        raise DataError(
            "The data set has one row or one prompt; KTO's baseline needs other prompts' completions: add some."
        )
    other = next(row for row in rows if row["prompt_ids"] != rows[-1]["prompt_ids"])  # of the last row: from the start
    pairs = []
    for row, following in zip(reversed(rows), [other, *reversed(rows[1:])], strict=True):
        other = other if following["prompt_ids"] == row["prompt_ids"] else following
        extra = {name: [row[name][0], other[name][0]] for name in ("completion_ids", "completion_mask") if name in row}
        pairs.append({**row, **extra})
    return type(dataset).from_list(pairs[::-1], features=dataset.features)
