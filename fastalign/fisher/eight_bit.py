"""Sums of squares in 8 bits an entry: what `fisher_diagonal(..., bits=8)` adds up in, and what files of 8 bits hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastalign.ops.accumulate_fisher import accumulate_fisher_

# Code 0 is 0, codes 1 to 255 are 2^((code - 255) * STEP) times the scale of the row: 24 octaves.
STEP = 24 / 254
# Of a matrix that is open at a time, in float32.
_TILE = 1 << 20


class ByteSums:
    """A matrix of sums that only grow: codes (rows, columns) uint8, scale (rows, 1), in whose dtype values come out.

    A value is rounded to one of the two codes around it, 7 % apart, at random and so that the mean is the value: the
    nearest would lose whatever is added in portions of less than half a step (Morris 1978, Counting large numbers of
    events in small registers). Scales grow by whole steps, so that entries to which nothing is added stay as they are.
    """

    def __init__(self, codes: Tensor, scale: Tensor, generator: torch.Generator | None = None):
        self.codes, self.scale, self.generator = codes, scale, generator

    @classmethod
    def zeros(cls, like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> ByteSums:
        scale = torch.zeros(like.shape[0], 1, dtype=dtype, device=like.device)
        return cls(torch.zeros(like.shape, dtype=torch.uint8, device=like.device), scale, generator)

    @classmethod
    def nearest(cls, values: Tensor) -> ByteSums:
        """Each value by the code nearest to it: off by at most 3.4 % of itself, or 6e-8 of the largest of its row."""
        scale = values.amax(1, keepdim=True) if values.numel() else values.new_zeros(values.shape[0], 1)
        return cls(_places(values, scale).round_().to(torch.uint8), scale)

    def __getitem__(self, rows: slice) -> ByteSums:
        """These rows, in the same memory."""
        return ByteSums(self.codes[rows], self.scale[rows], self.generator)

    def values(self, rows: slice | Tensor = slice(None)) -> Tensor:
        return _levels(self.scale)[self.codes[rows].int()] * self.scale[rows]

    @contextmanager
    def opened(self, rows: slice | Tensor) -> Iterator[Tensor]:
        """The values of these rows, to be added to; what they are then is kept."""
        values, old = self.values(rows), self.scale[rows]
        yield values
        largest = values.amax(1, keepdim=True)
        steps = (largest / old).log2_().div_(STEP).ceil_().clamp_(min=0)
        self.scale[rows] = scale = torch.where(old > 0, old * torch.exp2(steps * STEP), largest)
        below = _places(values, scale).floor_().clamp_(max=254).int()
        levels = _levels(scale)
        share = (values / scale - levels[below]) / levels.diff()[below]  # of the way to the next code
        up = torch.rand(share.shape, dtype=share.dtype, device=share.device, generator=self.generator) < share
        self.codes[rows] = (below + up).to(torch.uint8)

    def div_(self, by: float) -> ByteSums:
        self.scale.div_(by)
        return self


def _levels(like: Tensor) -> Tensor:
    """What each code stands for, of a scale of 1."""
    levels = torch.exp2((torch.arange(256, dtype=like.dtype, device=like.device) - 255) * STEP)
    levels[0] = 0.0
    return levels


def _places(values: Tensor, scale: Tensor) -> Tensor:
    """Where the values lie between the codes, 0 to 255."""
    places = (values / scale).log2_().div_(STEP).add_(255)
    return places.nan_to_num_(nan=0.0, neginf=0.0).clamp_(0, 255)  # 0 / 0 where a row is 0


def add_products_(sums: Tensor | ByteSums, grad_output: Tensor, input: Tensor, cu_seqlens: Tensor) -> None:
    """`accumulate_fisher_`, a tile of rows after another where the sums are in 8 bits."""
    if isinstance(sums, Tensor):
        accumulate_fisher_(sums, grad_output, input, cu_seqlens)
        return
    rows = max(1, _TILE // sums.codes.shape[1])
    for start in range(0, sums.codes.shape[0], rows):
        tile = slice(start, start + rows)
        with sums.opened(tile) as values:
            accumulate_fisher_(values, grad_output[:, tile], input, cu_seqlens)


def add_rows_(sums: Tensor | ByteSums, index: Tensor, values: Tensor) -> None:
    """`sums[index] += values`, where a row may come more than once."""
    if isinstance(sums, Tensor):
        sums.index_add_(0, index, values)
        return
    rows, places = index.unique(return_inverse=True)
    with sums.opened(rows) as opened:
        opened.index_add_(0, places, values)
