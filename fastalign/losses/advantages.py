"""Advantages: how much better an answer was than one expects, from the rewards of a group of answers to one prompt.

Rewards are (G, k): k answers to each of G prompts. NaN stands for an answer that could not be scored. It is left out of
every mean, and its advantage is 0.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fastalign.errors import InputError

Scale = Literal["group", "batch", "none"]

# Added to a standard deviation, as in TRL, so that a group with hardly any spread does not blow up.
EPSILON = 1e-4


def group_relative(rewards: Tensor, scale: Scale = "group") -> Tensor:
    """The reward less the mean of its group, over a standard deviation.

        A = (r - mean of group) / (std + 1e-4)      std of the group, of the batch, or without division

    A group whose rewards are all equal has advantages of exactly 0.

    Args:
        rewards: (G, k) floating, NaN where there is none; k is 2 or more.
        scale: What the differences are divided by.

    Returns:
        (G, k), 0 where the reward is NaN.

    Raises:
        InputError: k is 1, or `scale` is unknown.

    References:
        Shao et al. 2024, arXiv:2402.03300; without division: Liu et al. 2025, arXiv:2503.20783.
    """
    _check(rewards)
    if scale not in get_args(Scale):
        raise InputError(f"scale is {scale!r}; expected one of {', '.join(get_args(Scale))}")
    scored = ~rewards.isnan()
    centred = _centred(rewards, scored)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (_deviation(rewards, scored, dim=1) + EPSILON)
    every = rewards[scored]
    return centred / ((every.std() if every.numel() > 1 else every.new_zeros(())) + EPSILON)


def leave_one_out(rewards: Tensor) -> Tensor:
    """The reward less the mean reward of the other answers to the same prompt (RLOO).

    Args:
        rewards: (G, k) floating, NaN where there is none; k is 2 or more.

    Returns:
        (G, k), 0 where the reward is NaN, or is the only one of its group.

    Raises:
        InputError: k is 1.

    References:
        Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740.
    """
    _check(rewards)
    scored = ~rewards.isnan()
    count = scored.sum(1, keepdim=True)
    # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1), which is exactly 0 for equal rewards.
    return _centred(rewards, scored) * count / (count - 1).clamp(min=1)


def without_spread(rewards: Tensor) -> Tensor:
    """(G,) bool: where all rewards of a group are equal, or at most one is there. Such a group teaches nothing."""
    scored = ~rewards.isnan()
    highest = rewards.masked_fill(~scored, -torch.inf).amax(1)
    lowest = rewards.masked_fill(~scored, torch.inf).amin(1)
    return (highest == lowest) | (scored.sum(1) < 2)


def _centred(rewards: Tensor, scored: Tensor) -> Tensor:
    """The reward less the mean of its group's; exactly 0 where all are equal, which a mean may miss by rounding."""
    filled = rewards.masked_fill(~scored, 0.0)
    centred = filled - filled.sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)
    return centred.masked_fill(~scored | without_spread(rewards)[:, None], 0.0)


def _deviation(rewards: Tensor, scored: Tensor, dim: int) -> Tensor:
    squares = _centred(rewards, scored).square().sum(dim, keepdim=True)
    return (squares / (scored.sum(dim, keepdim=True) - 1).clamp(min=1)).sqrt()


def _check(rewards: Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise InputError(
            f"rewards is {tuple(rewards.shape)}; a baseline from the group needs (G, k) with at least k = 2 answers to "
            "each prompt: set num_generations to 2 or more"
        )
