"""The rows that are scored: found, gathered before the products, scattered after them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.errors import InputError


def kept_rows(mask: Tensor | None) -> Tensor | None:
    """The numbers of the unmasked rows, None for all of them."""
    return None if mask is None or bool(mask.all()) else mask.nonzero().squeeze(1)


class ScoredRows(NamedTuple):
    """The rows that have a target."""

    rows: Tensor | None  # their numbers, None for all
    targets: Tensor  # theirs
    ignored: Tensor | None  # (N,) rows that stay, as zeros, although they have none


def find_scored_rows(targets: Tensor, ignore_index: int | None, vocab: int) -> ScoredRows:
    """Sort out the rows without a target, and check targets against the vocabulary.

    On a GPU, where ignored rows are to be found, the host has to wait for their number.
    """
    if ignore_index is None:
        check_targets(targets, ignore_index, vocab)
        return ScoredRows(None, targets.contiguous(), None)
    kept = targets != ignore_index
    if is_capturing(targets.device):
        targets = targets.masked_fill(~kept, 0)
        check_targets(targets, ignore_index, vocab)
        return ScoredRows(None, targets, ~kept)
    rows = kept.nonzero().squeeze(1)
    everything = rows.numel() == targets.numel()
    targets = targets.contiguous() if everything else targets[rows]
    check_targets(targets, ignore_index, vocab)
    return ScoredRows(None if everything else rows, targets, None)


def check_targets(targets: Tensor, ignore_index: int | None, vocab: int) -> None:
    inside = targets.clamp(0, vocab - 1) == targets
    if targets.device.type != "cpu":
        torch._assert_async(inside.all(), "linear_logprobs: a target is outside the vocabulary")
    elif not inside.all():
        bad = targets[~inside][0].item()
        or_ignored = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise InputError(
            f"targets holds {bad}, but weight has {vocab} rows; give token ids in [0, {vocab}){or_ignored}"
        )


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: then shapes may not depend on values, and no row can be dropped."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def gather_rows(t: Tensor, scored: ScoredRows) -> Tensor:
    if scored.ignored is not None:
        t = t.masked_fill(scored.ignored.view(-1, *[1] * (t.dim() - 1)), 0)
    return pad_rows(t if scored.rows is None else t[scored.rows])


def scatter_rows(values: Tensor, scored: ScoredRows, n: int) -> Tensor:
    """The inverse of `_gather`: rows that were dropped are 0."""
    if scored.ignored is not None:
        return values[:n].masked_fill(scored.ignored.view(-1, *[1] * (values.dim() - 1)), 0)
    if scored.rows is None:
        return values if values.shape[0] == n else values[:n].clone()
    return values.new_zeros(n, *values.shape[1:]).index_copy_(0, scored.rows, values[: scored.rows.shape[0]])


# BLAS libraries take other code paths, with other rounding, for a handful of rows; whole multiples of this many
# rows all give a row the same bits (measured with MKL from 8 rows on).
ROW_MULTIPLE = 16


def padded(rows: int) -> int:
    """The next number of rows that gives each row the same bits in any batch."""
    return rows + -rows % ROW_MULTIPLE


def pad_rows(t: Tensor) -> Tensor:
    """Rows (N, ...) filled up with zeros to `padded(N)`."""
    missing = padded(t.shape[0]) - t.shape[0]
    return t if missing == 0 else torch.cat([t, t.new_zeros(missing, *t.shape[1:])])
