"""Knowledge distillation: the mixture of a loss on data with the divergence from a teacher."""

from __future__ import annotations

from torch import Tensor


def distillation_loss(align: Tensor, divergence: Tensor, *, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """A loss on data, mixed with the divergence from a teacher.

        L = a L_align + (1 - a) tau^2 D

    D is the divergence of both distributions at temperature tau. Its gradient shrinks as 1 / tau^2, and the factor
    tau^2 makes up for that, so that `weight` means the same at every temperature.

    Args:
        align: The loss on data, of any shape.
        divergence: D, of a shape that fits `align`.
        weight: a, the share of the loss on data, from 0 to 1.
        temperature: tau, above 0: the temperature at which D was computed.

    Returns:
        The mixture, in the shape of both.

    References:
        Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    return weight * align + (1 - weight) * temperature**2 * divergence
