"""f-DPO: DPO under other divergences than the reverse KL (Wang et al. 2023, arXiv:2309.16240).

DPO follows from a policy that is held to its reference by the reverse KL. Under another f-divergence the implied reward
of a completion is beta f'(r), where r is its probability under the policy divided by that under the reference. The
loss is therefore DPO's logistic loss with another margin:

    L = -log s(beta (g(u) - g(v)))  with  g(a) = f'(exp(a)),  u = chosen - ref_chosen,  v = rejected - ref_rejected

The reverse KL has f'(r) = log r + 1, which gives `dpo`. The head of `fastalign.losses` says what all losses have in
common.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses.checks import check_logprobs
from fastalign.losses.numerics import logistic_loss

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
F_DIVERGENCES: tuple[FDivergence, ...] = get_args(FDivergence)


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, continued along its tangent where the value nears the largest number of the dtype.

    It is exact up to x = 74 in float32 and 695 in float64. Beyond, no float can hold the exponential. The tangent keeps
    the value finite and the gradient large, just where the policy is furthest off.
    """
    top = math.log(torch.finfo(x.dtype).max) - 14
    capped = x.clamp(max=top)
    # autograd computes the gradient of expm1 as result + 1. Below -1 that sum would lose its digits, so exp is used.
    inside = torch.where(capped > -1, torch.expm1(capped), torch.exp(capped) - 1)
    return inside + math.exp(top) * torch.relu(x - top)


def divergence_scores(log_ratios: Tensor, divergence: FDivergence, coefficient: float = 0.5) -> Tensor:
    """What takes the place of log-ratios to the reference under another divergence than the reverse KL.

        reverse_kl         a                              a = log of the ratio r of policy and reference
        forward_kl         1 - exp(-a)                    f'(r) = 1 - 1 / r
        js_divergence      log 2 + log s(a)               f'(r) = log(2 r / (1 + r))
        alpha_divergence   (exp((c - 1) a) - 1) / (c - 1)  f'(r) = (r^(c - 1) - 1) / (c - 1), a at c = 1

    A loss of the margin u - v becomes that loss under the divergence when it is given the scores of u and v instead,
    with 0 for the reference.

    Args:
        log_ratios: (B,) log-probability sums under the policy minus those under the reference.
        divergence: The name, as TRL's `f_divergence_type` has it.
        coefficient: c of the alpha divergence; TRL's `f_alpha_divergence_coef`.

    Returns:
        (B,) the scores.

    Raises:
        InputError: The divergence is unknown, or the coefficient is not finite.

    References:
        Wang et al. 2023, arXiv:2309.16240.
    """
    if divergence == "reverse_kl":
        return log_ratios
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratios)
    if divergence not in F_DIVERGENCES or not math.isfinite(coefficient):
        raise InputError(
            f"divergence is {divergence!r} with coefficient {coefficient!r}; expected one of "
            f"{', '.join(F_DIVERGENCES)} and a finite number."
        )
    order = -1.0 if divergence == "forward_kl" else coefficient - 1
    return log_ratios if abs(order) < 1e-6 else _expm1(order * log_ratios) / order


def dpo_alpha(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> Tensor:
    """DPO under the alpha-divergence: DPO as alpha goes to 0, DPO under the forward KL at 1.

        L = -log s(beta (exp(-alpha v) - exp(-alpha u)) / alpha)

    It is the f-divergence with f'(r) = (1 - r^-alpha) / alpha. TRL's `f_alpha_divergence_coef` is 1 - alpha.

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Strength of the pull to the reference, above 0.
        alpha: Order of the divergence, in (0, 1].

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or an option is out of range.

    References:
        Wang et al. 2023, arXiv:2309.16240.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if not 0 < alpha <= 1:
        raise InputError(f"alpha is {alpha!r}; expected a number in (0, 1]: use dpo for the limit at 0.")
    # The difference of two expm1 instead of two exp: for small log-ratios the exponentials are all near 1.
    margin = (_expm1(-alpha * (rejected - ref_rejected)) - _expm1(-alpha * (chosen - ref_chosen))) / alpha
    return logistic_loss(beta * margin, 0.0)


def dpo_forward_kl(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """DPO under the forward KL.

        L = -log s(beta (exp(-v) - exp(-u)))

    It is the f-divergence with f'(r) = -1 / r.

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Strength of the pull to the reference, above 0.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or beta is not above 0.

    References:
        Wang et al. 2023, arXiv:2309.16240.
    """
    return dpo_alpha(chosen, rejected, ref_chosen, ref_rejected, beta=beta, alpha=1.0)


def dpo_js(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO under the Jensen-Shannon divergence.

        L = -(1 - eps) log s(x) - eps log s(-x)  with  x = beta (log s(u) - log s(v))

    It is the f-divergence with f'(r) = log(2 r / (1 + r)) = log 2 + log s(log r).

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
        Wang et al. 2023, arXiv:2309.16240.
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    margin = F.logsigmoid(chosen - ref_chosen) - F.logsigmoid(rejected - ref_rejected)
    return logistic_loss(beta * margin, label_smoothing)
