"""Packing: tokenised prompts and completions become one unpadded row, or right-padded rows for models that need them.

A group is one prompt and its completions. In a packed row it lies as `prompt | completion 0 | completion 1 | ...`:
the prompt is computed once, and every completion's positions continue where the prompt's end. Which token may see
which is the layout's business (see attention.py). Only the hidden states that predict a scored token are needed
afterwards; `score_index` names them, so that prompts and padding never reach the output layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import compress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.errors import InputError


class Group(NamedTuple):
    """One prompt and its completions as `(start, stop)` ranges of row positions, one after another without gaps.

    A token of the prompt sees the prompt up to itself; a token of a completion sees the whole prompt and its own
    completion up to itself.
    """

    prompt: tuple[int, int]
    completions: tuple[tuple[int, int], ...]


@dataclass
class PackedBatch:
    """One micro-batch of C completions with S scored tokens, packed into one row of T tokens or padded to R rows of L.

    Attributes:
        input_ids: (1, T) or (R, L) int64.
        position_ids: (1, T) int64; None for padded rows, whose positions are the default ones.
        attention_mask: (R, L) int64, 1 on tokens; None for a packed row, which has no padding.
        layout: the groups of the packed row, in order; None for padded rows.
        score_index: (S,) int64, positions in the flattened hidden states that predict the scored tokens. The last
            prompt token is there once per completion.
        targets: (S,) int64, the scored tokens; None: nothing is scored, only hidden states are wanted.
        cu_seqlens: (C + 1,) int64, offsets into the S scored tokens, one span per completion: group by group, each
            group's completions in order.
        completion_lengths: (C,) int64, tokens of each completion, scored or not.
        filling: how many of a packed row's last tokens are there for its length alone, see `filled`.

    With an empty prompt nothing predicts the first token of a completion, so it is not scored.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    layout: tuple[Group, ...] | None
    score_index: Tensor
    targets: Tensor | None
    cu_seqlens: Tensor
    completion_lengths: Tensor
    filling: int = 0

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for the model's forward: `input_ids` and what else of this batch the model needs."""
        inputs = {n: getattr(self, n) for n in ("input_ids", "position_ids", "attention_mask")}
        return {name: value for name, value in inputs.items() if value is not None}

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in values.items() if torch.is_tensor(v)})


def pack(examples: Sequence[Mapping], *, share_prompts: bool = True) -> PackedBatch:
    """Packs examples into one row without padding.

    Args:
        examples: mappings with `prompt_ids` (list of ints, may be empty), `completion_ids` (list of k >= 1 non-empty
            lists of ints) and, optionally, `completion_mask` (the same shape, 1 = scored; absent or None: all are).
        share_prompts: each prompt once for all its completions; False gives each completion its own copy. Targets,
            `cu_seqlens` and results are the same either way.

    Raises:
        InputError: no examples, a missing field, no or an empty completion, a mask of another shape, a negative token.
    """
    ids, positions, groups, scored = [], [], [], _Scored()
    for prompt, completions, masks in _checked(examples):
        pairs = list(zip(completions, masks, strict=True))
        for sharers in [pairs] if share_prompts else [[pair] for pair in pairs]:
            prompt_range = (len(ids), len(ids) + len(prompt))
            ids.extend(prompt)
            positions.extend(range(len(prompt)))
            ranges = []
            for completion, mask in sharers:
                ranges.append((len(ids), len(ids) + len(completion)))
                ids.extend(completion)
                positions.extend(range(len(prompt), len(prompt) + len(completion)))
                scored.add(prompt_range, ranges[-1], completion, mask)
            groups.append(Group(prompt_range, tuple(ranges)))
    return PackedBatch(
        input_ids=_tokens([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=None,
        layout=tuple(groups),
        **scored.tensors(),
    )


def pad_to_multiple(batch: PackedBatch, multiple: int) -> PackedBatch:
    """A packed row made as long as a multiple of so many tokens, by a completion of nothing that is not scored; padded
    rows as they are.

    For a GPU, where the library looks for the best kernel for each new number of rows, while everything waits.
    """
    length = batch.input_ids.shape[1]
    if batch.layout is None or not (more := -length % multiple):
        return batch
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, more)),
        position_ids=F.pad(batch.position_ids, (0, more)),
        layout=(*batch.layout, Group((length, length), ((length, length + more),))),
        filling=more,
    )


def pad(examples: Sequence[Mapping], pad_token_id: int) -> PackedBatch:
    """Lays examples out as right-padded rows, `prompt | completion`, for models that cannot be packed.

    Args and errors are those of `pack`; `score_index` points into the hidden states flattened to (R * L, H).
    """
    if pad_token_id is None or pad_token_id < 0:
        raise InputError(f"pad_token_id is {pad_token_id}; it must be a token of the vocabulary, for example EOS.")
    rows, scored = [], _Scored()
    checked = list(_checked(examples))
    length = max(len(prompt) + max(map(len, completions)) for prompt, completions, _ in checked)
    for prompt, completions, masks in checked:
        for completion, mask in zip(completions, masks, strict=True):
            start = len(rows) * length
            stop = start + len(prompt)
            scored.add((start, stop), (stop, stop + len(completion)), completion, mask)
            rows.append([*prompt, *completion])
    return PackedBatch(
        input_ids=_tokens([row + [pad_token_id] * (length - len(row)) for row in rows]),
        position_ids=None,
        attention_mask=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        layout=None,
        **scored.tensors(),
    )


class _Scored:
    """Collects the scored tokens of one completion after another."""

    def __init__(self):
        self.index, self.targets, self.offsets, self.lengths = [], [], [0], []

    def add(self, prompt: tuple[int, int], span: tuple[int, int], completion: Sequence[int], mask: Sequence | None):
        first = 1 if prompt[0] == prompt[1] else 0
        index = [prompt[1] - 1, *range(span[0], span[1] - 1)][first:]
        targets = completion[first:]
        if mask is not None:
            index, targets = list(compress(index, mask[first:])), list(compress(targets, mask[first:]))
        self.index.extend(index)
        self.targets.extend(targets)
        self.offsets.append(len(self.index))
        self.lengths.append(len(completion))

    def tensors(self) -> dict[str, Tensor]:
        names = ("score_index", "targets", "cu_seqlens", "completion_lengths")
        lists = (self.index, self.targets, self.offsets, self.lengths)
        return {name: torch.tensor(values, dtype=torch.int64) for name, values in zip(names, lists, strict=True)}


def _checked(examples: Sequence[Mapping]) -> Iterator[tuple[Sequence[int], Sequence, Sequence]]:
    if len(examples) == 0:
        raise InputError("There are no examples to lay out: pass at least one.")
    for number, example in enumerate(examples):
        for name in ("prompt_ids", "completion_ids"):
            if name not in example:
                raise InputError(f"Example {number} has no {name!r}; it has {sorted(example)}: tokenise it.")
        completions = example["completion_ids"]
        if len(completions) == 0 or not all(map(len, completions)):
            raise InputError(
                f"Example {number} has an empty completion (lengths {[len(c) for c in completions]}): every prompt "
                "needs at least one completion, and every completion at least one token. Drop the example."
            )
        masks = example.get("completion_mask")
        if masks is None:
            masks = [None] * len(completions)
        elif [len(m) for m in masks] != [len(c) for c in completions]:
            raise InputError(
                f"Example {number} has a completion_mask of lengths {[len(m) for m in masks]} for completions of "
                f"lengths {[len(c) for c in completions]}: give one 0 or 1 for each completion token."
            )
        yield example["prompt_ids"], completions, masks


def _tokens(rows: list[list[int]]) -> Tensor:
    ids = torch.tensor(rows, dtype=torch.int64)
    if (lowest := int(ids.min())) < 0:
        raise InputError(f"Found the token id {lowest}; token ids are 0 or more. Keep label fillers out of them.")
    return ids


def lay_out(examples: list[dict], layout: str, pad_token_id: int) -> PackedBatch:
    """The micro-batch of some examples, in the layout that `prepare` found for the model."""
    if layout == "padded":
        return pad(examples, pad_token_id)
    return pack(examples, share_prompts=layout == "shared")
