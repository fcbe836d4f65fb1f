"""Knowledge distillation: the mixture of a loss on data with the divergence from a teacher."""

from __future__ import annotations

from torch import Tensor


def distillation_loss(align: Tensor, divergence: Tensor, *, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """`a L_align + (1 - a) tau^2 D`, a the weight, D the divergence of both distributions at temperature tau.

    tau^2 makes up for the gradient of D, which shrinks as 1 / tau^2 (Hinton et al. 2015, arXiv:1503.02531, section 2).
    """
    return weight * align + (1 - weight) * temperature**2 * divergence
