"""Alignment via optimal transport (AOT): the distributions of the whole batch are compared, not the pairs one by one.

In one dimension the optimal transport between two samples joins their quantiles, so sorting both is all it takes.
Two consequences:

- The entries of the result follow the quantiles, not the pairs.
- A batch that is split into micro-batches has another loss, because each micro-batch is sorted by itself.

The head of `fastalign.losses` says what all losses have in common.
"""

from __future__ import annotations

from torch import Tensor

from fastalign.losses.checks import check_logprobs
from fastalign.losses.numerics import logistic_loss


def aot(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT, paired: every quantile of the policy's margins should exceed that of the reference's margins.

        L = -(1 - eps) log s(beta d) - eps log s(-beta d)  with
        d = sort(chosen - rejected) - sort(ref_chosen - ref_rejected)

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Scale of the differences, above 0.
        label_smoothing: eps, the probability that a pair's label is wrong, in [0, 0.5).

    Returns:
        (B,) the loss of each quantile.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or an option is out of range.

    References:
        Melnyk et al. 2024, arXiv:2406.05882.
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    # In one dimension the cheapest transport between two sets pairs them in sorted order.
    margins, ref_margins = (chosen - rejected).sort().values, (ref_chosen - ref_rejected).sort().values
    return logistic_loss(beta * (margins - ref_margins), label_smoothing)


def aot_unpaired(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT, unpaired: every quantile of the chosen log-ratios should exceed that of the rejected ones.

        L = -(1 - eps) log s(beta d) - eps log s(-beta d)  with
        d = sort(chosen - ref_chosen) - sort(rejected - ref_rejected)

    The rejected completions may answer other prompts than the chosen ones.

    Args:
        chosen: (B,) log-probability sums of the chosen completions under the policy.
        rejected: (B,) those of the rejected completions.
        ref_chosen: (B,) `chosen` under the reference.
        ref_rejected: (B,) `rejected` under the reference.
        beta: Scale of the differences, above 0.
        label_smoothing: eps, the probability that a pair's label is wrong, in [0, 0.5).

    Returns:
        (B,) the loss of each quantile.

    Raises:
        InputError: The tensors differ in shape, dtype or device, or an option is out of range.

    References:
        Melnyk et al. 2024, arXiv:2406.05882.
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    chosen_ratios, rejected_ratios = (chosen - ref_chosen).sort().values, (rejected - ref_rejected).sort().values
    return logistic_loss(beta * (chosen_ratios - rejected_ratios), label_smoothing)
