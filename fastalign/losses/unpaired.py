"""Losses over single completions with a label each: desirable, or not.

The formulas use these symbols:

    u = logprobs - ref_logprobs      the log-ratio of a completion to the reference
    s(x) = 1 / (1 + exp(-x))         the logistic sigmoid

The head of `fastalign.losses` says what all losses have in common.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses.checks import check_logprobs, describe
from fastalign.losses.numerics import sigmoid


def _check_labels(labels: Tensor, logprobs: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.bool or labels.shape != logprobs.shape:
        raise InputError(
            f"labels is {describe(labels)}; expected a {tuple(logprobs.shape)} bool tensor, True where the completion "
            "is desirable."
        )


def kto(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    labels: Tensor,
    kl: float | Tensor,
    *,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Kahneman-Tversky optimisation (KTO).

        L = w_d (1 - s(beta (u - kl))) where desirable,
            w_u (1 - s(beta (kl - u))) where not

    With kl = 0 this is `apo_zero_unpaired`.

    Args:
        logprobs: (B,) log-probability sums of the completions under the policy.
        ref_logprobs: (B,) those under the reference.
        labels: (B,) bool, True where the completion is desirable.
        kl: The reference point z0, a float or a scalar tensor: see `kto_baseline`.
        beta: Scale of the rewards, above 0.
        weights: (w_d, w_u), the weights of desirable and undesirable completions, at least 0.

    Returns:
        (B,) the loss of each completion.

    Raises:
        InputError: The tensors differ in shape, dtype or device, `labels` is not bool, or an option is out of range.

    References:
        Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7.
    """
    check_logprobs(beta, logprobs=logprobs, ref_logprobs=ref_logprobs)
    _check_labels(labels, logprobs)
    desirable, undesirable = weights
    if not (0 <= desirable < math.inf and 0 <= undesirable < math.inf):
        raise InputError(f"weights is {weights!r}; expected (desirable, undesirable), both finite and at least 0.")
    x = beta * (logprobs - ref_logprobs - kl)
    return torch.where(labels, desirable * sigmoid(-x), undesirable * sigmoid(x))


def apo_zero_unpaired(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    labels: Tensor,
    kl: float | Tensor = 0.0,
    *,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Anchored preference optimisation (APO-zero) on single completions: KTO with its reference point at 0.

        L = w_d (1 - s(beta u)) where desirable,
            w_u s(beta u) where not

    It needs no mismatched completions. On a pair, the sum of both is `apo_zero`.

    Args:
        logprobs: (B,) log-probability sums of the completions under the policy.
        ref_logprobs: (B,) those under the reference.
        labels: (B,) bool, True where the completion is desirable.
        kl: 0, at which the loss is anchored. With any other value it is `kto`.
        beta: Scale of the rewards, above 0.
        weights: (w_d, w_u), the weights of desirable and undesirable completions, at least 0.

    Returns:
        (B,) the loss of each completion.

    Raises:
        InputError: The tensors differ in shape, dtype or device, `labels` is not bool, or an option is out of range.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7; TRL's `apo_zero_unpaired`.
    """
    return kto(logprobs, ref_logprobs, labels, kl, beta=beta, weights=weights)


def kto_baseline(mismatched: Tensor, ref_mismatched: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference), from completions that answer other prompts of the batch.

        kl = max(0, mean(mismatched - ref_mismatched))

    Args:
        mismatched: (B,) log-probability sums of the mismatched completions under the policy.
        ref_mismatched: (B,) those under the reference.

    Returns:
        A scalar in nats per completion, without gradient.

    Raises:
        InputError: The tensors differ in shape, dtype or device.

    References:
        Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    check_logprobs(1.0, mismatched=mismatched, ref_mismatched=ref_mismatched)
    return (mismatched - ref_mismatched).mean().clamp(min=0).detach()


def bco(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    labels: Tensor,
    delta: float | Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Binary classifier optimisation (BCO).

        L = -log s(beta u - delta) where desirable,
            -log s(delta - beta u) where not

    Args:
        logprobs: (B,) log-probability sums of the completions under the policy.
        ref_logprobs: (B,) those under the reference.
        labels: (B,) bool, True where the completion is desirable.
        delta: The paper's reward shift, a float or a scalar tensor: half the sum of the running mean rewards beta u of
            both labels, which the caller keeps.
        beta: Scale of the rewards, above 0.

    Returns:
        (B,) the loss of each completion.

    Raises:
        InputError: The tensors differ in shape, dtype or device, `labels` is not bool, or beta is not above 0.

    References:
        Jung et al. 2024, arXiv:2404.04656.
    """
    check_logprobs(beta, logprobs=logprobs, ref_logprobs=ref_logprobs)
    _check_labels(labels, logprobs)
    x = beta * (logprobs - ref_logprobs) - delta
    return -F.logsigmoid(torch.where(labels, x, -x))
