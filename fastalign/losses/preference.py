"""Losses of the margin: how much more the policy prefers the chosen completion than its reference does.

The formulas use these symbols:

    m = (chosen - ref_chosen) - (rejected - ref_rejected)    the margin of a pair
    s(x) = 1 / (1 + exp(-x))                                 the logistic sigmoid
    eps                                                      `label_smoothing`, the share of pairs whose label is wrong

The docstring of `fastalign.losses` says what all losses have in common.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses.checks import check_logprobs
from fastalign.losses.numerics import logistic_loss, sigmoid


def implicit_rewards(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The reward that a policy trained by DPO implies, up to a term that depends on the prompt alone.

        r = beta * (policy - reference)

    Args:
        policy: (B,) log-probability sums of the completions under the policy.
        reference: (B,) the same sums under the reference.
        beta: Strength of the pull to the reference, above 0.

    Returns:
        (B,) rewards in nats times beta, without gradient.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or beta is not above 0.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 5.
    """
    check_logprobs(beta, policy=policy, reference=reference)
    return beta * (policy - reference).detach()


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation (DPO); with label smoothing, conservative DPO.

        L = -(1 - eps) log s(beta m) - eps log s(-beta m)

    On averages per token this is the row `dpo_norm` of the table, which TRL calls `sigmoid_norm`. TRL 1.16 ignores
    `label_smoothing` in both `sigmoid` and `sigmoid_norm`.

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Strength of the pull to the reference, above 0. Smaller values let the policy move further.
        label_smoothing: eps, the probability that a pair's label is wrong, in [0, 0.5).

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or an option is out of range.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7. Smoothing: Mitchell 2023, "A note on DPO with noisy preferences
        and relationship to IPO". Averages: Lambert et al. 2024, arXiv:2411.15124.
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return logistic_loss(beta * margin, label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """Identity preference optimisation (IPO): pulls the margin to a fixed target, so that it cannot grow for ever.

        L = (m - 1 / (2 beta))^2

    The paper writes sums of log-probabilities. TRL uses averages per token. This function computes the formula on what
    it is given, and a target that suits averages is far too small for sums. The trainer and `pairwise_loss` give it
    averages unless `length_normalised` says otherwise.

    Args:
        chosen: (B,) log-probabilities of the chosen completions under the policy, sums or averages per token.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Above 0; the target margin is 1 / (2 beta). The paper calls it tau, which is not the `tau` of `ipo_tau`.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or beta is not above 0.

    References:
        Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (margin - 1 / (2 * beta)).square()


def ipo_tau(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    tau: float = 0.5,
) -> Tensor:
    """IPO with a separate option for the target margin of the scaled rewards.

        L = (beta m - tau)^2

    With tau = 1/2 this is beta^2 times `ipo`. Unlike `ipo`'s, its gradient stays bounded for small beta.

    Args:
        chosen: (B,) log-probabilities of the chosen completions under the policy, sums or averages per token.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Scale of the rewards, above 0.
        tau: Target of the scaled margin, finite.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or an option is out of range.

    References:
        Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if not math.isfinite(tau):
        raise InputError(f"tau is {tau!r}; expected a finite number: 0.5 gives the loss of the paper.")
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (beta * margin - tau).square()


def hinge(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """The rank calibration loss of SLiC-HF, on log-ratios to the reference as in RSO.

        L = max(0, 1 - beta m)

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Scale of the margin, above 0. Pairs whose margin exceeds 1 / beta have no gradient.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or beta is not above 0.

    References:
        SLiC-HF: Zhao et al. 2023, arXiv:2305.10425. RSO (`hinge-norm`): Liu et al. 2023, arXiv:2309.06657.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return torch.relu(1 - beta * margin)


def robust(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Robust DPO: an unbiased estimate of the DPO loss when a known share of the labels is wrong.

        L = (-(1 - eps) log s(beta m) + eps log s(-beta m)) / (1 - 2 eps)

    If labels are flipped with probability eps, the expected value of this loss equals DPO on the correct labels. It
    has no lower bound: for large margins it falls as -eps beta m / (1 - 2 eps).

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Strength of the pull to the reference, above 0.
        label_smoothing: eps, the probability that a pair's label is wrong, in [0, 0.5).

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or an option is out of range.

    References:
        Chowdhury et al. 2024, arXiv:2403.00409.
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    x = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    # With log s(-x) = log s(x) - x the formula becomes -log s(x) - eps x / (1 - 2 eps). With x near 0 and eps near 1/2
    # the two terms of the formula nearly cancel, and their difference would lose its digits. The terms of this form do
    # not cancel.
    return -F.logsigmoid(x) - label_smoothing / (1 - 2 * label_smoothing) * x


def exo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """Efficient exact optimisation (EXO): the reverse KL from the policy's preference to the smoothed label.

        L = q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps)  with  q = s(beta m)

    The policy prefers the chosen completion with probability q, the label says 1 - eps. At eps = 0 the KL is infinite
    for every q below 1, so that value is refused. TRL calls this loss `exo_pair`.

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Strength of the pull to the reference, above 0.
        label_smoothing: eps, in (0, 0.5).

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or an option is out of range.

    References:
        Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    if label_smoothing == 0:
        raise InputError("label_smoothing is 0 and the exo loss is infinite there; the paper recommends 1e-3.")
    x = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    log_win, log_lose = F.logsigmoid(x), F.logsigmoid(-x)
    # The probabilities come from their logarithms, whose gradient stays accurate: see `sigmoid` in numerics.py.
    win_term = log_win.exp() * (log_win - math.log1p(-label_smoothing))
    return win_term + log_lose.exp() * (log_lose - math.log(label_smoothing))


def discopop(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
) -> Tensor:
    """DiscoPOP, the log-ratio modulated loss: logistic below a margin of 0, exponential above it.

        L = -(1 - w) log s(x) + w exp(-x)  with  x = beta m,  w = s(x / tau)

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Strength of the pull to the reference, above 0.
        discopop_tau: tau, in (0, 1]. Above 1 the exponential term would grow without bound as the margin falls.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or an option is out of range.

    References:
        Lu et al. 2024, arXiv:2406.08414, eq. 5.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if not 0 < discopop_tau <= 1:
        raise InputError(f"discopop_tau is {discopop_tau!r}; expected a number in (0, 1]: the paper uses 0.05.")
    x = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    scaled = x / discopop_tau
    # w exp(-x) is computed as one exponential: at x = -1e4 the two factors would be 0 and infinity.
    return torch.exp(F.logsigmoid(scaled) - x) - sigmoid(-scaled) * F.logsigmoid(x)
