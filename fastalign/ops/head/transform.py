"""What turns the products of an output layer into logits: scale, soft cap and temperature.

This file and `fastalign/reference.py` hold the only two Python definitions of the formula. The kernels in kernels/ and
csrc/ repeat these formulas, and are tested against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """From a product `u = h W' + b` to its logit: `z = softcap * tanh(logit_scale * u / softcap) / temperature`.

    Without a soft cap: `z = logit_scale * u / temperature`.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """The slope dz/du at u = 0, and everywhere where there is no soft cap."""
        return self.logit_scale / self.temperature

    def logits_(self, u: Tensor) -> Tensor:
        """The logits in place of the products u, of any shape."""
        return self.logits_and_slope_(u, slope=False)[0]

    def logits_and_slope_(self, u: Tensor, *, slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """The logits in place of the products u, and the slope dz/du where a soft cap makes it vary, else None."""
        if self.softcap is None:
            return (u.mul_(self.factor) if self.factor != 1.0 else u), None
        t = u.mul_(self.logit_scale / self.softcap).tanh_()
        slopes = (1 - t * t).mul_(self.factor) if slope else None  # d tanh(x) / dx = 1 - tanh(x)^2
        return t.mul_(self.softcap / self.temperature), slopes

    def slope(self, z: Tensor) -> Tensor:
        """dz/du where the logit is z, from z alone; 0 for a z at (or, as for a ruled-out entry, beyond) the cap."""
        if self.softcap is None:
            return torch.full_like(z, self.factor)
        t = (z * (self.temperature / self.softcap)).clamp_(-1, 1)  # tanh of the scaled product
        return (1 - t * t).mul_(self.factor)


# The schema of an op has no type for a LogitTransform: it passes these three numbers, 0 for no soft cap.


def pack_transform(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float, float]:
    """The three numbers that an op's `float[]` argument carries."""
    return float(logit_scale), float(softcap or 0.0), float(temperature)


def unpack_transform(numbers: Sequence[float]) -> LogitTransform:
    """The inverse of `pack_transform`."""
    logit_scale, softcap, temperature = numbers
    return LogitTransform(logit_scale, softcap or None, temperature)
