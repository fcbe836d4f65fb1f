"""f-DPO: DPO under other divergences than the reverse KL (Wang et al. 2023, arXiv:2309.16240).

Where the policy is held to its reference by the f-divergence D_f, the implied reward is beta f'(r) with r the
probability ratio to the reference, so the loss is DPO's logistic one on g(u) - g(v), g(a) = f'(exp(a)) and u, v the
log-ratios. The reverse KL has f'(r) = log r + 1 and gives `dpo`. Arguments and
conventions are those of preference.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses.checks import check_logprobs, logistic


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, continued along its tangent where the value nears the largest number of the dtype.

    Up to there (x = 74 in float32, 695 in float64) it is exact. Beyond, no float can hold the exponential; the
    tangent keeps the value finite and the gradient from vanishing just where the policy is furthest off.
    """
    top = math.log(torch.finfo(x.dtype).max) - 14
    capped = x.clamp(max=top)
    # Below -1 the gradient of expm1, computed from its result as result + 1, would lose its digits.
    inside = torch.where(capped > -1, torch.expm1(capped), torch.exp(capped) - 1)
    return inside + math.exp(top) * torch.relu(x - top)


def dpo_alpha(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> Tensor:
    """-log s(beta (exp(-alpha v) - exp(-alpha u)) / alpha).

    DPO under the alpha-divergence, f'(r) = (1 - r^-alpha) / alpha with alpha in (0, 1]: DPO as alpha goes to 0, the
    forward KL at 1 (Wang et al. 2023, arXiv:2309.16240). TRL's `f_alpha_divergence_coef` is 1 - alpha.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if not 0 < alpha <= 1:
        raise InputError(f"alpha is {alpha!r}; expected a number in (0, 1]: use dpo for the limit at 0.")
    margin = (_expm1(-alpha * (rejected - ref_rejected)) - _expm1(-alpha * (chosen - ref_chosen))) / alpha
    return logistic(beta * margin, 0.0)


def dpo_forward_kl(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """-log s(beta (exp(-v) - exp(-u))).

    DPO under the forward KL, f'(r) = -1/r (Wang et al. 2023, arXiv:2309.16240).
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
    """-(1 - e) log s(x) - e log s(-x) with x = beta (log s(u) - log s(v)).

    DPO under the Jensen-Shannon divergence, f'(r) = log(2 r / (1 + r)) = log 2 + log s(log r) (Wang et al. 2023,
    arXiv:2309.16240).
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    margin = F.logsigmoid(chosen - ref_chosen) - F.logsigmoid(rejected - ref_rejected)
    return logistic(beta * margin, label_smoothing)
