"""What the drop-in losses share."""

from __future__ import annotations

import torch
from torch import Tensor


def logits_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B,) the sum of each row's (T, V) logits.

    The logits are linear in both factors, so their sum is the product of the summed hidden states and the summed
    weight rows. No logit is computed.
    """
    hidden, weight = hidden.detach(), weight.detach()
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.sum(1, dtype=dtype) @ weight.sum(0, dtype=dtype)
    return total if bias is None else total + hidden.shape[1] * bias.detach().sum(dtype=dtype)


def reference_arguments(
    use_ref_model: bool, target: Tensor, ref_input: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> dict[str, Tensor | None]:
    """The reference as the fused calls take it; without a reference model its log-probabilities are 0, as in Liger."""
    if use_ref_model:
        return {"ref_hidden": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
    return {"ref_logps": torch.zeros(target.shape[0], device=target.device)}
