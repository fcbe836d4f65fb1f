"""Sums of squares in 8 bits per entry: the accumulators of `fisher_diagonal(..., bits=8)`, and what its files hold.

Fisher information spans many orders of magnitude, and only ratios matter. So the 8 bits hold a logarithm: code c stands
for `2^((c - 255) * 24 / 254)` times the scale of its row, and code 0 for zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastalign.ops.accumulate_fisher import accumulate_fisher_

# Octaves between two codes: codes 1 to 255 span 24 octaves below the scale of the row.
STEP = 24 / 254
# Entries of a matrix that are unpacked to float32 at a time.
_TILE = 1 << 20


class ByteSums:
    """A matrix of sums that only grow, in 8 bits per entry.

    A value lies between two codes, which are 7 % apart. It is rounded to one of them at random, such that the mean is
    the value. Rounding to the nearest would lose everything that is added in portions of less than half a step (Morris
    1978, Counting large numbers of events in small registers). Scales grow by whole steps, so that entries to which
    nothing is added keep their value.

    Args:
        codes: (rows, columns) uint8.
        scale: (rows, 1), the value of code 255 in each row; values have its dtype.
        generator: of the random rounding.
    """

    def __init__(self, codes: Tensor, scale: Tensor, generator: torch.Generator | None = None):
        self.codes, self.scale, self.generator = codes, scale, generator

    @classmethod
    def zeros(cls, like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> ByteSums:
        """Sums of 0 for a matrix of the shape and device of `like`, with values in `dtype`."""
        scale = torch.zeros(like.shape[0], 1, dtype=dtype, device=like.device)
        return cls(torch.zeros(like.shape, dtype=torch.uint8, device=like.device), scale, generator)

    @classmethod
    def nearest(cls, values: Tensor) -> ByteSums:
        """Each value as the nearest code: off by at most 3.4 % of itself, or by 6e-8 of the largest in its row."""
        scale = values.amax(1, keepdim=True) if values.numel() else values.new_zeros(values.shape[0], 1)
        return cls(_places(values, scale).round_().to(torch.uint8), scale)

    def __getitem__(self, rows: slice) -> ByteSums:
        """A view of these rows: what is added to it is added to the matrix."""
        return ByteSums(self.codes[rows], self.scale[rows], self.generator)

    def values(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """The values of some rows, in the scale's dtype."""
        return _levels(self.scale)[self.codes[rows].int()] * self.scale[rows]

    @contextmanager
    def opened(self, rows: slice | Tensor) -> Iterator[Tensor]:
        """A context with the values of these rows: what is added to them inside is rounded and stored at its end."""
        values, old = self.values(rows), self.scale[rows]
        yield values
        largest = values.amax(1, keepdim=True)
        # The number of steps by which a scale must grow to hold the row's new largest value; 0 / 0 in a row of zeros.
        steps = (largest / old).log2_().div_(STEP).ceil_().clamp_(min=0)
        self.scale[rows] = scale = torch.where(old > 0, old * torch.exp2(steps * STEP), largest)
        below = _places(values, scale).floor_().clamp_(max=254).int()
        levels = _levels(scale)
        share = (values / scale - levels[below]) / levels.diff()[
            below
        ]  # how far the value is on the way to the next code
        up = torch.rand(share.shape, dtype=share.dtype, device=share.device, generator=self.generator) < share
        self.codes[rows] = (below + up).to(torch.uint8)

    def div_(self, by: float) -> ByteSums:
        """Divides every value in place."""
        self.scale.div_(by)
        return self


def _levels(like: Tensor) -> Tensor:
    """(256,): the value of each code in a row whose scale is 1."""
    levels = torch.exp2((torch.arange(256, dtype=like.dtype, device=like.device) - 255) * STEP)
    levels[0] = 0.0
    return levels


def _places(values: Tensor, scale: Tensor) -> Tensor:
    """The values as fractional codes, 0 to 255."""
    places = (values / scale).log2_().div_(STEP).add_(255)
    return places.nan_to_num_(nan=0.0, neginf=0.0).clamp_(0, 255)  # 0 / 0 where a row is 0


def add_products_(sums: Tensor | ByteSums, grad_output: Tensor, inputs: Tensor, cu_seqlens: Tensor) -> None:
    """`accumulate_fisher_(sums, grad_output, inputs, cu_seqlens)`, by tiles of rows where the sums are in 8 bits."""
    if isinstance(sums, Tensor):
        accumulate_fisher_(sums, grad_output, inputs, cu_seqlens)
        return
    rows = max(1, _TILE // sums.codes.shape[1])
    for start in range(0, sums.codes.shape[0], rows):
        tile = slice(start, start + rows)
        with sums.opened(tile) as values:
            accumulate_fisher_(values, grad_output[:, tile], inputs, cu_seqlens)


def add_rows_(sums: Tensor | ByteSums, index: Tensor, values: Tensor) -> None:
    """`sums[index] += values`, where `index` may hold a row more than once."""
    if isinstance(sums, Tensor):
        sums.index_add_(0, index, values)
        return
    rows, places = index.unique(return_inverse=True)
    with sums.opened(rows) as opened:
        opened.index_add_(0, places, values)
