"""The next token of each row, and its log-probability."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256  # entries of the vocabulary whose probabilities are added up first


def pick(logits: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
    """Draws a token per row from `softmax(logits / temperature)`, or takes the most likely one.

    Args:
        logits: (R, V) float32.
        temperature: Divides the logits; None: the most likely token, whose log-probability is at temperature 1.

    Returns:
        (R,) int64 tokens, and (R,) float32 their log-probabilities in nats.
    """
    top = logits.amax(-1, keepdim=True)  # (R, 1)
    weights = logits - top
    if temperature not in (None, 1.0):
        weights /= temperature
    weights.exp_()  # (R, V), proportional to the probabilities
    if temperature is None:
        tokens, total = logits.argmax(-1, keepdim=True), weights.sum(-1, keepdim=True, dtype=torch.float64)
    else:
        tokens, total = _draw(weights)
    chosen = (logits.gather(1, tokens) - top).double() / (temperature or 1.0) - total.log()
    return tokens[:, 0], chosen[:, 0].float()


def _draw(weights: Tensor) -> tuple[Tensor, Tensor]:
    """A token per row with a probability proportional to its weight, and the sum of the weights.

    One uniform number per row, from torch's generator, says where in the cumulative sum of the weights the token lies.
    First the block of 256 tokens is looked up, then the token inside. This needs one pass over the vocabulary, and
    float64 sums of a few numbers, where a cumulative sum over the whole vocabulary would take several.

    Args:
        weights: (R, V) float32, not negative.

    Returns:
        (R, 1) int64 tokens, and (R, 1) float64 sums.
    """
    rows, vocabulary = weights.shape
    whole = vocabulary // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    ends = sums.double().cumsum(1)  # (R, blocks)
    total = ends[:, -1:]
    point = torch.rand(rows, 1, dtype=torch.float64, device=weights.device) * total
    block = _find(ends, point)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)  # (R, 256)
    inside = weights.gather(1, columns.clamp(max=vocabulary - 1)).double() * (columns < vocabulary)
    inner = inside.cumsum(1)
    # How far into the block the point lies, as a share of it: the block's sum in float32 is not quite that in float64.
    share = 1 - (ends.gather(1, block) - point) / sums.gather(1, block).double()
    token = _find(inner, share.clamp(min=0.0) * inner[:, -1:])
    return columns.gather(1, token), total


def _find(ends: Tensor, point: Tensor) -> Tensor:
    """The first entry whose cumulative sum is above the point, (R, 1). It has a weight above 0.

    A point at the end of everything, which only rounding brings there, counts as the last entry with a weight.
    """
    point = torch.minimum(point, torch.nextafter(ends[:, -1:], torch.zeros_like(point)))
    return torch.searchsorted(ends, point, right=True)
