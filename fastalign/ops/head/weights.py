"""Output layers whose weight does not exist as one matrix in floating point.

Three things may be put together to the weight (V, H) of an output layer:

- `weight`: in floating point, or packed in 4 or 8 bits,
- a LoRA adapter (Hu et al. 2021, arXiv:2106.09685), which adds `scale * b a`,
- new rows, which take the place of some rows of `weight`: trained embeddings of new tokens.

The sum is not formed either, since `h (W + s b a)' = [h, h a'] [W, s b]'`: the adapter makes hidden states and weight r
columns wider. `ComposedWeight.tiles` writes [W, s b] for some entries of the vocabulary at a time into one buffer,
which every tile uses again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastalign.errors import InputError
from fastalign.ops.head.checks import check_floating
from fastalign.ops.head.tiling import row_slices, vocabulary_tiles

# Bytes of the buffer. With fewer a product gets too few columns to be fast, and with more it no longer stays in caches.
_TILE_BYTES = {"cpu": 5 << 20, "cuda": 64 << 20}
_MOST_ENTRIES = 16384
# A packed weight is dequantised in so many rows at a time on a CPU.
_ROWS_AT_A_TIME = 1024


class PackedWeight(Protocol):
    """What the ops need of a weight (out, in) in few bits; `fastalign.models.QuantizedWeight` is one.

    Attributes:
        shape: (out, in).
        device: Where it lies.
        dtype: What is multiplied in; None for the dtype of the hidden states.
        row_multiple: Rows can be dequantised from every multiple of this number on.
    """

    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype | None
    row_multiple: int

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """All rows, (out, in)."""
        ...

    def dequantize_rows(self, start: int, stop: int, out: Tensor) -> None:
        """Rows `start` to `stop` into `out` (stop - start, in), between whose rows there may be gaps."""
        ...


Lora = tuple[Tensor, Tensor, float]  # a (r, H), b (V, r), scale
NewRows = tuple[Tensor, Tensor]  # ids (k,) int64, all different, and rows (k, H)


class ComposedWeight(NamedTuple):
    """A weight (V, H) that is read in tiles of [W, scale * b], (entries, H + r)."""

    weight: Tensor | PackedWeight
    b: Tensor | None = None  # (V, r)
    scale: float = 1.0
    new_rows: NewRows | None = None

    @property
    def rank(self) -> int:
        """r, the columns that the adapter adds; 0 without one."""
        return 0 if self.b is None else self.b.shape[1]

    def tiles(self, like: Tensor, *, spare: bool = False) -> Iterator[tuple[int, int, Tensor]]:
        """The tiles in the order of the vocabulary: first entry, last entry + 1, and [W, scale * b] of those.

        Args:
            like: A tensor of the device and dtype that the tiles get.
            spare: Whether every tile has one more row at its end, a copy of the row before.
        """
        (vocab, width), rank = self.weight.shape, self.rank
        size = max(like.element_size(), 2)
        step = _entries((width + rank) * size, like.device, _multiple(self.weight))
        buffer = like.new_empty(min(step, vocab) + spare, width + rank)
        for start, stop in vocabulary_tiles(vocab, step):
            tile = buffer[: stop - start + spare]
            self._write(start, stop, tile[: stop - start])
            if spare:
                tile[-1] = tile[-2]
            yield start, stop, tile

    def _write(self, start: int, stop: int, tile: Tensor) -> None:
        width = self.weight.shape[1]
        of_weight = tile[:, :width]  # (T, H)
        if isinstance(self.weight, Tensor):
            of_weight.copy_(self.weight[start:stop])
        else:
            rows = max(stop - start, 1)
            if tile.device.type == "cpu":  # bitsandbytes makes a new tensor there: small ones stay in the caches
                rows = -(-_ROWS_AT_A_TIME // self.weight.row_multiple) * self.weight.row_multiple
            for part in row_slices(stop - start, rows):
                self.weight.dequantize_rows(start + part.start, start + part.stop, of_weight[part])
        if self.b is not None:
            tile[:, width:] = self.b[start:stop] * self.scale
        if self.new_rows is not None:
            ids, rows = self.new_rows
            here = ((ids >= start) & (ids < stop)).nonzero().squeeze(1)
            of_weight[ids[here] - start] = rows[here].to(tile.dtype)

    def dense(self, a: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight as one matrix (V, H): the definition of what the tiles stand for.

        Args:
            a: (r, H), the adapter's other factor.
            dtype: Of the result. A packed weight is dequantised in 32 bits at most.
        """
        weight = self.weight
        if not isinstance(weight, Tensor):
            weight = weight.dequantize(torch.float32 if dtype == torch.float64 else dtype)
        weight = weight.to(dtype)
        if self.new_rows is not None:
            weight = weight.index_copy(0, self.new_rows[0], self.new_rows[1].to(dtype))
        if self.b is not None and a is not None:
            weight = weight + (self.b @ a * self.scale).to(dtype)
        return weight


def _multiple(weight: Tensor | PackedWeight) -> int:
    return 1 if isinstance(weight, Tensor) else weight.row_multiple


def _entries(row_bytes: int, device: torch.device, multiple: int) -> int:
    """How many entries of the vocabulary a tile has: a multiple of 256, and of `multiple`, where so many fit."""
    fit = min(_TILE_BYTES.get(device.type, _TILE_BYTES["cuda"]) // row_bytes, _MOST_ENTRIES)
    fit = max(fit - fit % 256, 256)
    return max(fit - fit % multiple, multiple)


def product_dtype(hidden: Tensor, weight: Tensor | PackedWeight) -> torch.dtype:
    """The common dtype of the hidden states and a weight; a packed weight may leave it to the hidden states."""
    return hidden.dtype if weight.dtype is None else torch.promote_types(hidden.dtype, weight.dtype)


def check_composed(weight: Tensor | PackedWeight, lora: Lora | None, new_rows: NewRows | None) -> None:
    """Checks shapes, dtypes and devices of an adapter and of new rows on an output layer.

    Raises:
        InputError: One does not fit.
    """
    vocab, width = weight.shape
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled() and (lora or new_rows):
        raise InputError(
            "weight requires a gradient beside lora or new_rows, which are trained instead of it: pass weight.detach()"
        )
    if lora is not None:
        a, b, scale = lora
        for name, t in (("a", a), ("b", b)):
            check_floating(f"lora's {name}", t, "call .float()")
        rank = a.shape[0] if a.dim() == 2 else None
        if rank is None or tuple(a.shape) != (rank, width) or tuple(b.shape) != (vocab, rank):
            raise InputError(
                f"lora's a is {tuple(a.shape)} and b {tuple(b.shape)}; with a weight ({vocab}, {width}) they must be "
                f"(r, {width}) and ({vocab}, r)"
            )
        if not isinstance(scale, (int, float)):
            raise InputError(f"lora's scale is {scale!r}; it must be a number")
    if new_rows is not None:
        ids, rows = new_rows
        check_floating("new_rows' rows", rows, "call .float()")
        if ids.dtype != torch.int64 or ids.dim() != 1 or tuple(rows.shape) != (ids.shape[0], width):
            raise InputError(
                f"new_rows' ids are {tuple(ids.shape)} {ids.dtype} and its rows {tuple(rows.shape)}; they must be "
                f"(k,) int64 and (k, {width})"
            )
