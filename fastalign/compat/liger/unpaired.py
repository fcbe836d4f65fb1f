"""KTO: a loss over single rows with a label each. Inputs are padded: `_input` (B, T, H), `target` (B, T)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastalign.compat.liger.shared import logits_sum
from fastalign.errors import InputError
from fastalign.fused import have_target
from fastalign.losses import kto
from fastalign.ops import linear_logprobs


def liger_fused_linear_kto(
    _input: Tensor, weight: Tensor, target: Tensor, preference_labels: Tensor | None, bias: Tensor | None = None,
    ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    kl: float | Tensor | None = None, ignore_index: int | None = -100, beta: float = 0.1, compiled: bool = True,
    use_ref_model: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """KTO as a function: see `LigerFusedLinearKTOLoss`. As in Liger, only the function wants a reference by default.

    The arguments, in Liger's order:
        _input, weight, target, preference_labels, bias, ref_input, ref_weight: As in the module's `forward`.
        ref_bias, kl: As in the module's `forward`.
        ignore_index, beta, compiled, use_ref_model, average_log_prob, chunk_size: As in the module.

    Raises:
        InputError: Shapes or dtypes do not fit, or labels or the reference are missing.
    """
    if preference_labels is None:
        raise InputError("preference_labels is None; pass a (B,) bool tensor, True where the row is desirable")
    if isinstance(kl, Tensor) and kl.numel() != 1:
        raise InputError(f"kl is a {tuple(kl.shape)} tensor; KTO has one reference point per batch: pass its mean")
    if use_ref_model and ref_input is None:
        raise InputError("use_ref_model is True, but ref_input is None; pass the reference's hidden states")
    lengths = have_target(target, ignore_index).sum(1) if average_log_prob else 1

    def score(hidden: Tensor, head: Tensor, head_bias: Tensor | None) -> Tensor:
        """(B,) log-probabilities, summed or averaged."""
        return linear_logprobs(hidden, head, target, bias=head_bias, ignore_index=ignore_index).sum(1) / lengths

    logps = score(_input, weight, bias)
    ref = torch.zeros_like(logps)
    if use_ref_model and ref_input is not None:
        with torch.no_grad():
            ref = score(ref_input, *((weight, bias) if ref_weight is None else (ref_weight, ref_bias))).to(logps.dtype)
    point = 0.0 if kl is None else kl.detach().reshape(()).to(logps.dtype) if isinstance(kl, Tensor) else kl
    loss = kto(logps, ref, preference_labels, point, beta=beta).mean()
    logps = logps.detach()
    each = (logps, logits_sum(_input, weight, bias), beta * (logps - ref))
    return loss, tuple(t[rows].sum() for t in each for rows in (preference_labels, ~preference_labels))


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO over single rows with a label each.

    Args:
        ignore_index: The target of positions that are not scored; None: every position is scored.
        beta: Strength of the pull to the reference.
        compiled: No effect.
        use_ref_model: Whether there is a reference. False: its log-probabilities count as 0.
        average_log_prob: Whether the loss is given averages per token instead of the sums of the paper.
        chunk_size: No effect.
    """

    def __init__(
        self, ignore_index: int | None = -100, beta: float = 0.1, compiled: bool = True, use_ref_model: bool = False,
        average_log_prob: bool = False, chunk_size: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self, _input: Tensor, lin_weight: Tensor, target: Tensor, bias: Tensor | None = None,
        preference_labels: Tensor | None = None, ref_input: Tensor | None = None, ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None, kl: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The loss, and six sums: logps, logits and rewards, each of the chosen and then of the rejected rows.

        Args:
            _input: (B, T, H) hidden states.
            lin_weight: (V, H) weight of the output layer.
            target: (B, T) int64; `target[:, t]` is the token that `_input[:, t]` predicts.
            bias: (V,) bias of the output layer.
            preference_labels: (B,) bool, True where the row is desirable.
            ref_input: (B, T, H) hidden states of the reference.
            ref_weight: (V, H) the reference's output layer; None: `lin_weight`.
            ref_bias: (V,) the bias of `ref_weight`.
            kl: KTO's reference point, one number for the batch; None: 0.

        Raises:
            InputError: There are no labels, or shapes and dtypes do not fit.
        """
        return liger_fused_linear_kto(
            _input, lin_weight, target, preference_labels, bias, ref_input, ref_weight, ref_bias, kl,
            ignore_index=self.ignore_index, beta=self.beta, use_ref_model=self.use_ref_model,
            average_log_prob=self.average_log_prob,
        )  # fmt: skip


class LigerFusedLinearKTOFunction:
    """`apply` is `liger_fused_linear_kto`."""

    apply = staticmethod(liger_fused_linear_kto)
