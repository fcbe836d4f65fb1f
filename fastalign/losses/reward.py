"""Losses of reward models: scores of answers in, one loss per pair out."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, center_rewards_coefficient: float | None = None
) -> Tensor:
    """The negative log-likelihood that the chosen answer wins, and a term that holds the scores around 0.

        -log s(c - r - m) + center_rewards_coefficient (c + r)^2

    The first term fixes differences of scores only. The second one, usually with a coefficient of 0.01, keeps their
    sum near 0, so that scores of different prompts can be compared.

    Args:
        chosen: (P,) scores of the chosen answers.
        rejected: (P,) scores of the rejected answers.
        margin: (P,) by how much the chosen one should win; None: 0.
        center_rewards_coefficient: Weight of the second term; None: without it.

    Returns:
        (P,) losses.

    References:
        Bradley and Terry 1952; margins: Touvron et al. 2023, arXiv:2307.09288; centring: Eisenstein et al. 2023,
        arXiv:2312.09244.
    """
    difference = chosen - rejected
    losses = -logsigmoid(difference if margin is None else difference - margin)
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (chosen + rejected) ** 2
    return losses
