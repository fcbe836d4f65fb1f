"""Packing: tokenised prompts and completions as one row without padding, or as padded rows for models that need them.

A group is one prompt and its completions. A packed row holds the prompt once, followed by all its completions. The
positions of each completion continue where the prompt's end, as if the others were not there. For a prompt of three
tokens, a pair of completions, and the next prompt:

    place        0   1   2 |  3   4 |  5 |  6   7 |  8 |  9  10
    tokens      p0  p1  p2 | a0  a1 | b0 | q0  q1 | c0 | d0  d1
    positions    0   1   2 |  3   4 |  3 |  0   1 |  2 |  2   3
    sees        p          | p a    | pb | q      | qc | q d

The scored tokens are those of the completions. Their lists, without the prompts:

    targets     a0  a1 | b0 | c0 | d0  d1     the scored tokens
    score_index  2   3 |  2 |  7 |  7   9     the place of the hidden state that predicts each of them
    cu_seqlens   0       2    3    4      6   where each completion begins in these lists, and where the last one ends

Two separate rows p a and p b would give the same hidden states, but compute the prompt twice. Which token may see which
is enforced by the model's attention (fastalign/models/attention.py).

A hidden state predicts the token after it, so the last prompt token predicts the first token of every completion.
Only the hidden states that predict a scored token are needed for a loss. `score_index` lists their positions, so that
prompts and padding never reach the output layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import compress
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.data.segments import Group, Varlen, gathered_keys, segments_of
from fastalign.errors import InputError

# What `lay_out` takes, from the fewest tokens to the most.
Layout = Literal["shared", "packed", "padded"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass
class PackedBatch:
    """One micro-batch of C completions with S scored tokens: one packed row of T tokens, or R padded rows of L tokens.

    If a prompt is empty, nothing predicts the first token of its completions. That token is not scored.

    Attributes:
        input_ids: (1, T) or (R, L) int64.
        position_ids: (1, T) int64; None for padded rows, whose positions are those that the model uses by default.
        attention_mask: (R, L) int64, 1 on tokens and 0 on padding; None for a packed row, which has no padding.
        layout: the groups of a packed row, in order; None for padded rows.
        score_index: (S,) int64, positions in the flattened hidden states, (T, H) or (R * L, H), that predict the scored
            tokens. The last prompt token is listed once per completion.
        targets: (S,) int64, the scored tokens; None if only hidden states are wanted.
        cu_seqlens: offsets into the S scored tokens (not into the row), (C + 1,) int64: completion i has those from
            cu_seqlens[i] to cu_seqlens[i + 1]. Completions are in the order of the groups, and of each group's
            completions.
        completion_lengths: (C,) int64, tokens of each completion, scored or not.
        filling: how many tokens at the end of a packed row are fillers that `pad_to_multiple` added.
        keys: which keys each segment of a packed row sees, as the attention kernels of a GPU take it; None until
            `with_keys` has made it.
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
    keys: Varlen | None = None

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for the model's forward: `input_ids`, and `position_ids` or `attention_mask`."""
        inputs = {n: getattr(self, n) for n in ("input_ids", "position_ids", "attention_mask")}
        return {name: value for name, value in inputs.items() if value is not None}

    def with_keys(self) -> PackedBatch:
        """The same batch with `keys`, which attention on a GPU needs. Padded rows have none."""
        if self.layout is None or self.keys is not None:
            return self
        return replace(self, keys=gathered_keys(segments_of(self.layout)))

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on a device. The copy to a GPU does not wait for its end."""
        batch = self.with_keys() if torch.device(device).type == "cuda" else self
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        moved = {k: v.to(device, non_blocking=True) for k, v in values.items() if torch.is_tensor(v)}
        return replace(batch, **moved, keys=None if batch.keys is None else batch.keys.to(device))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory: a data loader with `pin_memory=True` calls this."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        movable = (Tensor, Varlen)
        return replace(self, **{k: v.pin_memory() for k, v in values.items() if isinstance(v, movable)})


def pack(examples: Sequence[Mapping], *, share_prompts: bool = True) -> PackedBatch:
    """Packs examples into one row without padding.

    Args:
        examples: mappings with `prompt_ids` (list of ints, may be empty), `completion_ids` (list of k >= 1 non-empty
            lists of ints) and perhaps `completion_mask` (the same shape, 1 for scored tokens). Without a mask all
            tokens are scored.
        share_prompts: whether the row holds a prompt once for all its completions. If False, each completion gets a
            copy of the prompt. `targets`, `cu_seqlens` and the results are the same either way.

    Returns:
        The batch, with input_ids and position_ids (1, T), a layout, and no attention_mask.

    Raises:
        InputError: there are no examples, a field is missing, a completion is missing or empty, a mask has another
            shape than the completions, or a token id is negative.

    Examples:
        The prompt 5 6 with the completions 7 8 and 9:

            input_ids      5 6   7 8   9
            position_ids   0 1   2 3   2      each completion continues the prompt
            score_index      1   2     1      token 7 is predicted at position 1 of the row, 8 at 2, and 9 at 1
            targets        7 8   9
            cu_seqlens     0 2 3              of the 3 scored tokens, 2 belong to the first completion
    """
    ids, positions, groups, scored = [], [], [], _ScoredTokens()
    for prompt, completions, masks in _checked(examples):
        pairs = list(zip(completions, masks, strict=True))
        for group in [pairs] if share_prompts else [[pair] for pair in pairs]:
            prompt_range = (len(ids), len(ids) + len(prompt))
            ids.extend(prompt)
            positions.extend(range(len(prompt)))
            ranges = []
            for completion, mask in group:
                ranges.append((len(ids), len(ids) + len(completion)))
                ids.extend(completion)
                positions.extend(range(len(prompt), len(prompt) + len(completion)))
                scored.add(prompt_range, ranges[-1], completion, mask)
            groups.append(Group(prompt_range, tuple(ranges)))
    return scored.batch(_tokens([ids]), position_ids=torch.tensor([positions]), layout=tuple(groups))


def pad_to_multiple(batch: PackedBatch, multiple: int) -> PackedBatch:
    """Makes a packed row's length a multiple of `multiple`, by one more group that is not scored.

    On a GPU the matrix library searches for its best kernel for every new number of rows, and everything waits
    meanwhile. Fewer lengths mean fewer searches.

    Args:
        batch: a packed row; padded rows are returned as they are.
        multiple: what the length must be a multiple of.

    Returns:
        The batch with a longer row. Its scored tokens are the same, so are `score_index`, `targets` and `cu_seqlens`.
        The batch itself if its length is such a multiple already.
    """
    length = batch.input_ids.shape[1]
    if batch.layout is None or batch.position_ids is None or not (more := -length % multiple):
        return batch
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, more)),
        position_ids=F.pad(batch.position_ids, (0, more)),
        layout=(*batch.layout, Group((length, length), ((length, length + more),))),
        filling=more,
        keys=None,
    )


def pad(examples: Sequence[Mapping], pad_token_id: int) -> PackedBatch:
    """Lays examples out as rows `prompt | completion`, padded on the right, for models that cannot be packed.

    Args:
        examples: as for `pack`. A prompt is repeated for each of its completions.
        pad_token_id: the token that fills the rows; it is masked, so any token of the vocabulary will do.

    Returns:
        The batch, with input_ids and attention_mask (R, L), one row per completion. It has no position_ids nor layout.

    Raises:
        InputError: as for `pack`, and if `pad_token_id` is None or negative.
    """
    if pad_token_id is None or pad_token_id < 0:
        raise InputError(f"pad_token_id is {pad_token_id}; it must be a token of the vocabulary, for example EOS.")
    rows, scored = [], _ScoredTokens()
    checked = list(_checked(examples))
    length = max(len(prompt) + max(map(len, completions)) for prompt, completions, _ in checked)
    for prompt, completions, masks in checked:
        for completion, mask in zip(completions, masks, strict=True):
            start = len(rows) * length
            stop = start + len(prompt)
            scored.add((start, stop), (stop, stop + len(completion)), completion, mask)
            rows.append([*prompt, *completion])
    return scored.batch(
        _tokens([row + [pad_token_id] * (length - len(row)) for row in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
    )


def last_tokens(batch: PackedBatch) -> Tensor:
    """Where the last token of each completion lies: what a reward model reads its score from.

    Positions follow from how the batch was laid out. Tokens are not looked at, so a padding token that also ends
    completions cannot be mistaken for padding.

    Args:
        batch: A batch of C completions.

    Returns:
        (C,) int64 positions in the flattened hidden states, on the device of the batch.
    """
    if batch.layout is None:
        assert batch.attention_mask is not None, "rows that are not packed are padded"
        length = batch.input_ids.shape[1]
        starts = torch.arange(len(batch.input_ids), device=batch.input_ids.device) * length
        return starts + batch.attention_mask.sum(1) - 1
    ends = [stop - 1 for group in batch.layout for _, stop in group.completions]
    completions = batch.cu_seqlens.numel() - 1  # a filling group behind them is none
    return torch.tensor(ends[:completions], device=batch.input_ids.device)


class _ScoredTokens:
    """Collects the scored tokens of one completion after another."""

    def __init__(self):
        self.index, self.targets, self.offsets, self.lengths = [], [], [0], []

    def add(self, prompt: tuple[int, int], span: tuple[int, int], completion: Sequence[int], mask: Sequence | None):
        """Adds a completion.

        Args:
            prompt: the range of its prompt in the flattened batch.
            span: the range of the completion in the flattened batch.
            completion: its tokens.
            mask: 1 for scored tokens; None if all are.
        """
        first = 1 if prompt[0] == prompt[1] else 0  # nothing predicts the first token behind an empty prompt
        # Each token is predicted at the position before it, which for the first token is the last one of the prompt.
        index = [prompt[1] - 1, *range(span[0], span[1] - 1)][first:]
        targets = completion[first:]
        if mask is not None:
            index, targets = list(compress(index, mask[first:])), list(compress(targets, mask[first:]))
        self.index.extend(index)
        self.targets.extend(targets)
        self.offsets.append(len(self.index))
        self.lengths.append(len(completion))

    def batch(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        layout: tuple[Group, ...] | None = None,
    ) -> PackedBatch:
        """The batch with these tokens, and everything that was collected about the scored ones."""
        lists = (self.index, self.targets, self.offsets, self.lengths)
        index, targets, offsets, lengths = (torch.tensor(values, dtype=torch.int64) for values in lists)
        return PackedBatch(input_ids, position_ids, attention_mask, layout, index, targets, offsets, lengths)


def _checked(examples: Sequence[Mapping]) -> Iterator[tuple[Sequence[int], Sequence, Sequence]]:
    """Prompt, completions and masks of each example; InputError for an example that cannot be laid out."""
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
    """(R, L) int64; InputError for a negative token."""
    ids = torch.tensor(rows, dtype=torch.int64)
    if (lowest := int(ids.min())) < 0:
        raise InputError(
            f"Found the token id {lowest}; token ids are 0 or more. Leave labels such as -100 out of them."
        )
    return ids


def lay_out(examples: list[dict], layout: Layout, pad_token_id: int) -> PackedBatch:
    """The micro-batch of some examples in the layout of a model.

    Args:
        examples: as for `pack`.
        layout: what `fastalign.models.prepare` returned for the model: "shared" (packed, each prompt once), "packed"
            (each completion with a copy of its prompt) or "padded".
        pad_token_id: fills the rows if the layout is "padded".

    Returns:
        What `pad` returns if the layout is "padded", else what `pack` returns.

    Raises:
        InputError: the layout is unknown, or as for `pack` and `pad`.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}, as `prepare` returns it.")
    if layout == "padded":
        return pad(examples, pad_token_id)
    return pack(examples, share_prompts=layout == "shared")
