"""Losses that judge each completion of a pair by its log-ratio, not only by the margin between the two.

The formulas use these symbols:

    u = chosen - ref_chosen, v = rejected - ref_rejected     the log-ratios to the reference
    m = u - v                                                the margin
    s(x) = 1 / (1 + exp(-x))                                 the logistic sigmoid

A loss of the margin alone does not care whether both log-probabilities rise or fall. These losses do.
The head of `fastalign.losses` says what all losses have in common.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastalign.losses.checks import check_logprobs
from fastalign.losses.numerics import sigmoid


def nca(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """Noise contrastive alignment (NCA): raises the chosen log-probability itself, not only the margin.

        L = -log s(beta u) - 1/2 log s(-beta u) - 1/2 log s(-beta v)

    TRL calls it `nca_pair`.

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Scale of the rewards, above 0.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or beta is not above 0.

    References:
        Chen et al. 2024, arXiv:2402.05369.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    chosen_reward, rejected_reward = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    # NCA tells the chosen completion from noise, and both completions count as samples of that noise.
    noise = F.logsigmoid(-chosen_reward) + F.logsigmoid(-rejected_reward)
    return -F.logsigmoid(chosen_reward) - 0.5 * noise


def bco_pair(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    delta: float | Tensor = 0.0,
) -> Tensor:
    """Binary classifier optimisation (BCO) on pairs: one classifier scores both completions.

        L = -log s(beta u - delta) - log s(-(beta v - delta))

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Scale of the rewards, above 0.
        delta: The paper's reward shift, a float or a scalar tensor: the running mean of (beta u + beta v) / 2, which
            the caller keeps. TRL's `bco_pair` has it 0.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or beta is not above 0.

    References:
        Jung et al. 2024, arXiv:2404.04656.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    chosen_reward, rejected_reward = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_reward - delta) - F.logsigmoid(delta - rejected_reward)


def sppo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """Self-play preference optimisation (SPPO), with a win probability of 1 for chosen and 0 for rejected.

        L = (u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2

    TRL calls it `sppo_hard`.

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Above 0; the paper's 1 / eta. The target of both log-ratios is 1 / (2 beta) away from 0.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or beta is not above 0.

    References:
        Wu et al. 2024, arXiv:2405.00675, eq. 4.7.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    target = 1 / (2 * beta)
    return (chosen - ref_chosen - target).square() + (rejected - ref_rejected + target).square()


def apo_zero(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """Anchored preference optimisation (APO-zero): chosen up, rejected down.

        L = 1 - s(beta u) + s(beta v)

    It suits chosen completions that are better than what the model writes itself.

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Scale of the rewards, above 0.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or beta is not above 0.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return sigmoid(-beta * (chosen - ref_chosen)) + sigmoid(beta * (rejected - ref_rejected))


def apo_down(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """Anchored preference optimisation (APO-down): both down, the rejected completion further.

        L = s(beta u) + 1 - s(beta m)

    It suits models that are better than the chosen completions.

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Scale of the rewards, above 0.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or beta is not above 0.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    return sigmoid(beta * chosen_ratio) + sigmoid(-beta * (chosen_ratio - rejected_ratio))
