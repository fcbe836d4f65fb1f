"""The segments of a packed row, and the keys that each of them sees, as index tensors for the kernels of a GPU.

A *segment* is a run of queries that sees `[prefix |] itself` (see `fastalign.models.attention`). The kernels for
segments of different lengths want the keys of a segment next to each other. So keys and values are gathered into a
longer row, in which each segment's prefix lies right before the segment:

    row             p0 p1 p2 | a0 a1 | b0           prompt p, completions a and b
    segments        p0 p1 p2   a0 a1 | b0           the second one has the prompt as its prefix
    gathered keys   p0 p1 p2   a0 a1 | p0 p1 p2 b0

The indices are made here, on the CPU, where batches are made. They lie in one tensor, so that one copy takes all of
them to a GPU. If they were made on the GPU from Python lists, the host would wait for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """One prompt and its completions as ranges `(start, stop)` in the row, one after another without gaps.

    A token of the prompt sees the prompt up to itself. A token of a completion sees the whole prompt, and that
    completion up to itself.

    Attributes:
        prompt: the prompt's range.
        completions: one range per completion.
    """

    prompt: tuple[int, int]
    completions: tuple[tuple[int, int], ...]


class Segment(NamedTuple):
    """`length` queries that see the first `prefix` tokens of segment number `source`, and themselves causally."""

    length: int
    prefix: int
    source: int


def segments_of(layout: Sequence[Group]) -> list[Segment]:
    """The segments of a row: a group's prompt and first completion are one, each further completion is another."""
    segments: list[Segment] = []
    for prompt, completions in layout:
        first = len(segments)
        segments.append(Segment(completions[0][1] - prompt[0], prefix=0, source=first))
        segments += [Segment(stop - start, prompt[1] - prompt[0], first) for start, stop in completions[1:]]
    return segments


@dataclass(frozen=True)
class Varlen:
    """Which tokens the K gathered keys of a row of T tokens are, and the kernels' description of the segments.

    Attributes:
        indices: int32, all the tensors below one after another: they are views of it.
        sizes: their lengths.
        longest_q: queries of the longest segment.
        longest_k: keys of the segment that has the most.
        key_index: (K,) the token that each gathered key belongs to.
        own: (T,) the place among the K of each token's key in the segment that the token is in.
        cu_seqlens_q: (segments + 1,) where each segment's queries begin.
        cu_seqlens_k: (segments + 1,) where each segment's keys begin.
        repeats: the other places, those of prefixes, as pairs (places, tokens). No token is twice in one pair.
    """

    indices: Tensor
    sizes: tuple[int, ...]
    longest_q: int
    longest_k: int
    key_index: Tensor = field(init=False)
    own: Tensor = field(init=False)
    cu_seqlens_q: Tensor = field(init=False)
    cu_seqlens_k: Tensor = field(init=False)
    repeats: tuple[tuple[Tensor, Tensor], ...] = field(init=False)

    def __post_init__(self):
        parts = self.indices.split(self.sizes)
        for name, part in zip(("key_index", "own", "cu_seqlens_q", "cu_seqlens_k"), parts, strict=False):
            object.__setattr__(self, name, part)
        object.__setattr__(self, "repeats", tuple(zip(parts[4::2], parts[5::2], strict=True)))

    def to(self, device: torch.device | str) -> Varlen:
        """The same on a device, by one copy whose end the host does not wait for."""
        return Varlen(self.indices.to(device, non_blocking=True), self.sizes, self.longest_q, self.longest_k)

    def pin_memory(self) -> Varlen:
        """The same in page-locked memory, from which copies to a GPU run beside other work."""
        return Varlen(self.indices.pin_memory(), self.sizes, self.longest_q, self.longest_k)


def gathered_keys(segments: Sequence[Segment]) -> Varlen:
    """The index tensors of the segments of one row, which are given in order. They are made on the CPU."""
    starts = [0, *accumulate(segment.length for segment in segments)]
    keys, own, bounds, seen, repeats = [], [], [0], {}, []
    for segment, start in zip(segments, starts, strict=False):
        source = starts[segment.source]
        if segment.prefix:
            # The n-th segment with the same prefix goes into the n-th pair, so that no pair holds a token twice.
            level = seen[segment.source] = seen.get(segment.source, -1) + 1
            if level == len(repeats):
                repeats.append(([], []))
            repeats[level][0].extend(range(len(keys), len(keys) + segment.prefix))
            repeats[level][1].extend(range(source, source + segment.prefix))
        keys += range(source, source + segment.prefix)
        own += range(len(keys), len(keys) + segment.length)
        keys += range(start, start + segment.length)
        bounds.append(len(keys))
    parts = [keys, own, starts, bounds, *(part for pair in repeats for part in pair)]
    return Varlen(
        torch.tensor([index for part in parts for index in part], dtype=torch.int32, device="cpu"),
        tuple(map(len, parts)), max(s.length for s in segments), max(s.length + s.prefix for s in segments),
    )  # fmt: skip
