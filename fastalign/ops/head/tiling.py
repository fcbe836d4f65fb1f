"""How large a tile of logits is, and how many rows a product gets: what all tiled drivers share.

A *tile* is the block of logits that exists at one time: some rows (tokens) by some vocabulary entries. Its size decides
speed, and which terms are added up in which order, so it must depend on the device alone. If it also depended on the
batch, a token's result would.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Where a running maximum starts: far below any logit, yet finite, so that (START - maximum) * 0 is 0 and not NaN.
START = -1e30

# BLAS libraries take other code paths, with other rounding, for a handful of rows. Every multiple of this many rows
# gives a row the same bits (measured with MKL: from 8 rows on).
ROW_MULTIPLE = 16

# Ops on logits that exist already take so many of them at a time: they make no second [tokens, V] tensor in float32.
LOGITS_AT_A_TIME = 1 << 21


def round_up_rows(rows: int) -> int:
    """The smallest multiple of ROW_MULTIPLE that holds `rows` rows."""
    return rows + -rows % ROW_MULTIPLE


def pad_rows(t: Tensor) -> Tensor:
    """Rows (N, ...) with zero rows appended until there are `round_up_rows(N)`."""
    missing = round_up_rows(t.shape[0]) - t.shape[0]
    return t if missing == 0 else torch.cat([t, t.new_zeros(missing, *t.shape[1:])])


def logprobs_tile_shape(device: torch.device) -> tuple[int, int]:
    """(rows, vocabulary entries) of one tile of `linear_logprobs`.

    On the CPU a tile is 8 MB of float32 logits. On a GPU it is a share of the memory: see `gpu_tile_shape`.
    """
    if device.type == "cuda":
        return _tile_shape_of_gpu(device)
    return (512, 4096) if device.type == "cpu" else (2048, 8192)


@lru_cache
def _tile_shape_of_gpu(device: torch.device) -> tuple[int, int]:
    if not torch.cuda.is_available():  # a graph that is traced for a GPU on a machine without one
        return gpu_tile_shape(16 << 30)
    return gpu_tile_shape(torch.cuda.get_device_properties(device).total_memory)


def gpu_tile_shape(memory_bytes: int) -> tuple[int, int]:
    """(rows, vocabulary entries) of one tile of `linear_logprobs` on a GPU with so many bytes of memory.

    A tile takes a thousandth of the memory, but 16 MB at least. It is as wide as the epilogues allow, for two reasons:
    every tile costs kernel launches, which small models wait for, and the second product reads and writes its (R, H)
    sums once per tile. Its rows are a multiple of 128, at least 256 so that a product reads the weight faster than it
    multiplies, and at most 2048. Tiles that fit the second-level cache were no faster (docs/explanation/gpu.md).
    """
    columns = 16384
    rows = memory_bytes // 1024 // (4 * columns)
    return min(max(rows - rows % 128, 256), 2048), columns


def divergence_tile_shape(device: torch.device) -> tuple[int, int]:
    """(most rows of a block, vocabulary entries) of one tile of the divergences.

    It is narrower than a tile of `linear_logprobs`: student, teacher and scratch tiles are in use at the same time.
    """
    return (512, 2048) if device.type == "cpu" else (4096, 8192)


def vocabulary_tiles(vocab: int, width: int) -> list[tuple[int, int]]:
    """The bounds [start, stop) of each tile over the vocabulary, in the order in which tiles are added up."""
    return [(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def logit_rows(vocab: int) -> int:
    """How many rows an op takes at a time of logits that exist already, so that its copies of them stay small."""
    return max(1, LOGITS_AT_A_TIME // max(vocab, 1))


def unmasked_rows(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """The numbers of the rows of logits (N, V) where mask (N,) is True, `logit_rows(V)` at a time."""
    numbers = torch.arange(len(logits), device=logits.device) if mask is None else mask.nonzero().squeeze(1)
    return numbers.split(logit_rows(logits.shape[1]))


def row_slices(rows: int, step: int) -> list[slice]:
    """`rows` rows in slices of `step`, the last one shorter."""
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
