"""Losses over pairs that need no reference model: they compare the policy's log-probabilities themselves.

With s the logistic sigmoid and eps for `label_smoothing`. The head of `fastalign.losses` says what all losses have in
common.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses.checks import check_logprobs
from fastalign.losses.numerics import log1mexp, logistic_loss


def simpo(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Simple preference optimisation (SimPO), on averages per token.

        L = -(1 - eps) log s(x) - eps log s(-x)  with  x = beta (chosen - rejected - gamma / beta)

    Args:
        chosen: (B,) average log-probability per token of the chosen completions.
        rejected: (B,) that of the rejected completions.
        beta: Scale of the averages, above 0.
        gamma_beta_ratio: gamma / beta, the target margin of the averages. TRL's `simpo_gamma` is beta times this.
        label_smoothing: eps, the probability that a pair's label is wrong, in [0, 0.5).

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or an option is out of range.

    References:
        Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    check_logprobs(beta, label_smoothing, chosen=chosen, rejected=rejected)
    if not math.isfinite(gamma_beta_ratio):
        raise InputError(f"gamma_beta_ratio is {gamma_beta_ratio!r}; expected a finite number: 0.5 is the usual start.")
    return logistic_loss(beta * (chosen - rejected - gamma_beta_ratio), label_smoothing)


def cpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """The preference term of contrastive preference optimisation (CPO).

        L = -(1 - eps) log s(x) - eps log s(-x)  with  x = beta (chosen - rejected)

    The paper's second term is the NLL of the chosen completion. It is a mean over tokens, so it is added outside: the
    trainer and `fused_linear_cpo` add it with weight 1 by default.

    Args:
        chosen: (B,) log-probability sums of the chosen completions.
        rejected: (B,) those of the rejected completions.
        beta: Scale of the margin, above 0.
        label_smoothing: eps, the probability that a pair's label is wrong, in [0, 0.5).

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or an option is out of range.

    References:
        Xu et al. 2024, arXiv:2401.08417, eq. 3.
    """
    check_logprobs(beta, label_smoothing, chosen=chosen, rejected=rejected)
    return logistic_loss(beta * (chosen - rejected), label_smoothing)


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """The odds ratio term of ORPO, on averages per token.

        L = -beta log s(logit(chosen) - logit(rejected))  with  logit(a) = a - log(1 - exp(a))

    The paper's first term is the NLL of the chosen completion. It is a mean over tokens, so it is added outside: the
    trainer and `fused_linear_orpo` add it with weight 1 by default.
    Over prompt and completion together, as the paper's authors and TRL take it, it is `fused_linear_orpo`'s
    `nll_targets` and the trainer's `nll_over`.

    An average of 0 means probability one and infinite odds. An average that has rounded to 0 therefore counts as the
    largest number below 0, and gets no gradient.

    Args:
        chosen: (B,) average log-probability per token of the chosen completions, at most 0.
        rejected: (B,) that of the rejected completions.
        beta: Weight of this term beside the NLL, above 0. The paper writes lambda.

    Returns:
        (B,) the loss of each pair.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or beta is not above 0.

    References:
        Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected)
    # An average log-prob may round to 0, a probability of 1, whose log odds are infinite.
    below_zero = -torch.finfo(chosen.dtype).tiny
    chosen, rejected = chosen.clamp(max=below_zero), rejected.clamp(max=below_zero)
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -beta * F.logsigmoid(log_odds_ratio)
