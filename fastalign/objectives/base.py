"""What a trainer minimises: token log-probabilities of one micro-batch in, one loss and its metrics out.

An objective divides by the totals of the whole accumulated batch, so that 8 micro-batches of 1 and 1 of 8 give the
same update. Metrics are (sum, count) pairs that stay on the device until something is logged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]


class Totals(NamedTuple):
    """Of all micro-batches of one optimiser step: pairs (or rows), and the tokens that averages are taken over."""

    items: Tensor
    tokens: Tensor  # of the NLL
    scored: Tensor  # of all completions

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(self, other, strict=True)))


def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.detach()
    return values.sum(), torch.full((), values.numel(), device=values.device)
