"""The rows (tokens) that are scored: found before the matrix products, gathered for them, scattered after them.

Rows that do not count never reach a product, which is why prompts and padding cost nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.head.checks import check_token_ids
from fastalign.ops.head.tiling import pad_rows


class ScoredRows(NamedTuple):
    """Which of N rows are scored.

    Usually the other rows are dropped, and `rows` lists those that stay. While a CUDA graph is captured nothing can be
    dropped, since shapes may not depend on values: then all rows stay, and `ignored` marks those that count as zeros.
    """

    rows: Tensor | None  # (S,) int64, the numbers of the scored rows; None: all N
    ignored: Tensor | None = None  # (N,) bool, or None


def kept_rows(mask: Tensor | None) -> Tensor | None:
    """The numbers (S,) of the rows where mask (N,) is True; None for all rows."""
    return None if mask is None or bool(mask.all()) else mask.nonzero().squeeze(1)


def counting_mask(mask: Tensor | None, token_weights: Tensor | None) -> Tensor | None:
    """Where a row is unmasked and has a weight other than 0, shaped like the inputs; None for everywhere."""
    if token_weights is None:
        return mask
    counts = token_weights != 0
    return counts if mask is None else mask & counts


def find_unmasked_rows(mask: Tensor | None) -> ScoredRows:
    """The rows where mask (N,) is True. On a GPU the host waits for their number, except while a graph is captured."""
    if mask is not None and is_capturing(mask.device):
        return ScoredRows(None, ~mask)
    return ScoredRows(kept_rows(mask))


def find_rows_with_target(targets: Tensor, ignore_index: int | None, vocab: int) -> tuple[ScoredRows, Tensor]:
    """The rows whose target (N,) is not `ignore_index`, and their targets, which are checked against the vocabulary.

    On a GPU the host waits for the number of rows, with two exceptions: where ignore_index is None, and while a graph
    is captured.
    """
    if ignore_index is None:
        check_token_ids("targets", targets, vocab, op="linear_logprobs")
        return ScoredRows(None), targets.contiguous()
    kept = targets != ignore_index
    if is_capturing(targets.device):
        targets = targets.masked_fill(~kept, 0)
        check_token_ids("targets", targets, vocab, op="linear_logprobs", ignore_index=ignore_index)
        return ScoredRows(None, ~kept), targets
    rows = kept.nonzero().squeeze(1)
    everything = rows.numel() == targets.numel()
    targets = targets.contiguous() if everything else targets[rows]
    check_token_ids("targets", targets, vocab, op="linear_logprobs", ignore_index=ignore_index)
    return ScoredRows(None if everything else rows), targets


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on this device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def gather_rows(t: Tensor, scored: ScoredRows, *, pad: bool = True) -> Tensor:
    """The scored rows of t (N, ...), padded with zero rows as the tiled products need it unless `pad` is False."""
    if scored.ignored is not None:
        t = t.masked_fill(scored.ignored.view(-1, *[1] * (t.dim() - 1)), 0)
    t = t if scored.rows is None else t[scored.rows]
    return pad_rows(t) if pad else t


def scatter_rows(values: Tensor, scored: ScoredRows, n: int) -> Tensor:
    """The inverse of `gather_rows`: n rows, of which those that were dropped are 0."""
    if scored.ignored is not None:
        return values[:n].masked_fill(scored.ignored.view(-1, *[1] * (values.dim() - 1)), 0)
    if scored.rows is None:
        return values if values.shape[0] == n else values[:n].clone()
    return values.new_zeros(n, *values.shape[1:]).index_copy_(0, scored.rows, values[: scored.rows.shape[0]])
