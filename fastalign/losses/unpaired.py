"""Losses over single completions with a binary label: desirable or not.

`logprobs` and `ref_logprobs` are (B,) tensors, both float32 or both float64: the log-probability of each completion,
summed over its tokens, under the policy and under the reference. `labels` is a (B,) bool tensor, True for desirable.
The result is the (B,) loss of each completion. With u the log-ratio `logprobs - ref_logprobs` and s the logistic
sigmoid. Values and gradients are finite and accurate at log-ratios of +-1e4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses.checks import check_logprobs, describe, sigmoid_loss


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
    """w_d (1 - s(beta (u - kl))) where desirable, w_u (1 - s(beta (kl - u))) where not; (w_d, w_u) = `weights`.

    Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7). `kl`, a float or a scalar
    tensor, is the reference point z0 of `kto_baseline`; with 0 this is TRL's `apo_zero_unpaired`. Raises InputError
    for unlike tensors, labels that are not bool, beta at or below 0 and negative weights.
    """
    check_logprobs(beta, logprobs=logprobs, ref_logprobs=ref_logprobs)
    _check_labels(labels, logprobs)
    desirable, undesirable = weights
    if not (0 <= desirable < math.inf and 0 <= undesirable < math.inf):
        raise InputError(f"weights is {weights!r}; expected (desirable, undesirable), both finite and at least 0.")
    x = beta * (logprobs - ref_logprobs - kl)
    return torch.where(labels, desirable * sigmoid_loss(-x), undesirable * sigmoid_loss(x))


def kto_baseline(mismatched: Tensor, ref_mismatched: Tensor) -> Tensor:
    """max(0, mean(mismatched - ref_mismatched)), a detached scalar: KTO's estimate of KL(policy || reference).

    The (B,) log-probability sums are of completions paired with other prompts of the batch (Ethayarajh et al. 2024,
    arXiv:2402.01306).
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
    """-log s(beta u - delta) where desirable, -log s(delta - beta u) where not.

    Binary classifier optimisation (Jung et al. 2024, arXiv:2404.04656). `delta`, a float or a scalar tensor, is
    the paper's reward shift: half the sum of the running mean rewards beta u of either label, which the caller keeps.
    Raises InputError for unlike tensors, labels that are not bool and beta at or below 0.
    """
    check_logprobs(beta, logprobs=logprobs, ref_logprobs=ref_logprobs)
    _check_labels(labels, logprobs)
    x = beta * (logprobs - ref_logprobs) - delta
    return -F.logsigmoid(torch.where(labels, x, -x))
