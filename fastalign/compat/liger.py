"""The loss modules of `liger_kernel.chunked_loss` (Liger Kernel 0.8.5): names, signatures, what they return.

    from fastalign.compat.liger import LigerFusedLinearDPOLoss

What to know before swapping the import:

- `compiled` and `chunk_size` choose how Liger computes. They are accepted and have no effect.
- Inputs are padded, chosen rows first: `_input` (2B, T, H), `target` (2B, T). The caller shifts: `target[:, t]` is the
  token that `_input[:, t]` predicts.
- Losses over pairs return `(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
  ...))`, as Liger's do, here always in float32. `nll_loss` is there whether or not it enters the loss.
- Only the loss carries gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastalign.errors import ConfigError, InputError
from fastalign.fused import fused_linear_kto, fused_linear_preference, have_target
from fastalign.losses import canonical
from fastalign.losses.numerics import log1mexp


def _logits_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B,) the sum of each row's (T, V) logits.

    The logits are linear in both factors, so their sum is the product of the summed hidden states and the summed
    weight rows. No logit is computed.
    """
    hidden, weight = hidden.detach(), weight.detach()
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.sum(1, dtype=dtype) @ weight.sum(0, dtype=dtype)
    return total if bias is None else total + hidden.shape[1] * bias.detach().sum(dtype=dtype)


def _reference(
    use_ref_model: bool, target: Tensor, ref_input: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> dict[str, Tensor | None]:
    """The reference as the fused calls take it; without a reference model its log-probabilities are 0, as in Liger."""
    if use_ref_model:
        return {"ref_hidden": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
    return {"ref_logps": torch.zeros(target.shape[0], device=target.device)}


def _pairs(
    weight: Tensor,
    hidden: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    loss_type: str,
    average: bool,
    ignore_index: int | None,
    nll_weight: float,
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What Liger's losses over pairs return, rewards last."""
    name = canonical(loss_type)
    out = fused_linear_preference(
        hidden, weight, target, bias=bias, loss_type=name, length_normalised={name} if average else (),
        ignore_index=ignore_index, nll_weight=nll_weight, **options,
    )  # fmt: skip
    logps, rewards = list(out[1:3]), list(out[3:5])
    if average:
        lengths = have_target(target, ignore_index).sum(1).chunk(2)
        logps = [sums / length for sums, length in zip(logps, lengths, strict=True)]
        rewards = [sums / length for sums, length in zip(rewards, lengths, strict=True)]
    entries = target.shape[0] // 2 * target.shape[1] * weight.shape[0]
    means = [half.sum() / entries for half in _logits_sum(hidden, weight, bias).chunk(2)]
    return out.loss, (*logps, *means, out.nll, *rewards)


class LigerFusedLinearDPOLoss(nn.Module):
    """DPO and the losses that Liger computes with it. The tuple ends with chosen and rejected rewards.

    Args:
        ignore_index: The target of positions that are not scored; None: every position is scored.
        beta: Strength of the pull to the reference.
        alpha: Weight of the NLL of the chosen rows, if `compute_nll_loss`.
        compute_nll_loss: Whether the NLL is added to the loss.
        compiled: No effect.
        use_ref_model: Whether there is a reference. False: its log-probabilities count as 0.
        average_log_prob: Whether the loss is given averages per token instead of sums.
        chunk_size: No effect.
        loss_type: Liger's name of the loss: "sigmoid", "robust", "exo_pair", ...
        label_smoothing: Probability that a label is wrong. As in Liger, only "robust" and "exo_pair" read it.
        discopop_tau: Temperature of "discopop".
    """

    def __init__(
        self, ignore_index: int | None = -100, beta: float = 0.1, alpha: float = 1.0, compute_nll_loss: bool = False,
        compiled: bool = True, use_ref_model: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
        loss_type: str = "sigmoid", label_smoothing: float = 0.0, discopop_tau: float = 0.05,
    ):  # fmt: skip
        super().__init__()
        self.loss_type, self.use_ref_model = loss_type, use_ref_model
        self.options: dict[str, Any] = {
            "loss_type": loss_type, "average": average_log_prob, "ignore_index": ignore_index, "beta": beta,
            "nll_weight": alpha if compute_nll_loss else 0.0,
        }  # fmt: skip
        if loss_type in ("robust", "exo_pair"):  # the only two whose labels Liger smooths
            self.options["label_smoothing"] = label_smoothing
        if loss_type == "discopop":
            self.options["discopop_tau"] = discopop_tau

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The loss and the tuple that the head of this file describes.

        Args:
            lin_weight: (V, H) weight of the output layer.
            _input: (2B, T, H) hidden states, the chosen rows first.
            target: (2B, T) int64; `target[:, t]` is the token that `_input[:, t]` predicts.
            bias: (V,) bias of the output layer.
            ref_input: (2B, T, H) hidden states of the reference.
            ref_weight: (V, H) the reference's output layer; None: `lin_weight`.
            ref_bias: (V,) the bias of `ref_weight`.
        """
        reference = _reference(self.use_ref_model, target, ref_input, ref_weight, ref_bias)
        return _pairs(lin_weight, _input, target, bias, **reference, **self.options)


class LigerFusedLinearORPOLoss(nn.Module):
    """ORPO. The tuple ends with rewards, the mean log-sigmoid of the log odds ratio, and the mean log odds ratio.

    Args:
        ignore_index: The target of positions that are not scored; None: every position is scored.
        beta: Weight of the odds ratio term.
        compute_nll_loss: Whether the NLL of the chosen rows is added to the loss.
        compiled: No effect.
        chunk_size: No effect.
    """

    def __init__(
        self, ignore_index: int | None = -100, beta: float = 0.1, compute_nll_loss: bool = True, compiled: bool = True,
        chunk_size: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.options: dict[str, Any] = {
            "loss_type": "orpo", "average": True, "ignore_index": ignore_index, "beta": beta,
            "nll_weight": float(compute_nll_loss),
        }  # fmt: skip

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The loss and the tuple that the head of this file describes, with the three entries of the class.

        Args:
            lin_weight: (V, H) weight of the output layer.
            _input: (2B, T, H) hidden states, the chosen rows first.
            target: (2B, T) int64; `target[:, t]` is the token that `_input[:, t]` predicts.
            bias: (V,) bias of the output layer.
            nll_target: (2B, T) int64, the tokens that the NLL counts; None: those of `target`.
        """
        loss, aux = _pairs(lin_weight, _input, target, bias, nll_targets=nll_target, **self.options)
        chosen, rejected = aux[:2]
        log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
        return loss, (*aux, nn.functional.logsigmoid(log_odds).mean(), log_odds.mean())


class LigerFusedLinearSimPOLoss(nn.Module):
    """SimPO. The tuple ends with chosen and rejected rewards.

    Args:
        ignore_index: The target of positions that are not scored; None: every position is scored.
        beta: Factor of the averages per token.
        alpha: Weight of the NLL of the chosen rows, if `compute_nll_loss`.
        label_smoothing: Probability that a label is wrong.
        compute_nll_loss: Whether the NLL is added to the loss.
        compiled: No effect.
        gamma: Target margin, on the scale of beta times the averages: `gamma_beta_ratio` is `gamma / beta`.
        chunk_size: No effect.
    """

    def __init__(
        self, ignore_index: int | None = -100, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
        compute_nll_loss: bool = True, compiled: bool = True, gamma: float = 0.5, chunk_size: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.options: dict[str, Any] = {
            "loss_type": "simpo", "average": True, "ignore_index": ignore_index, "beta": beta,
            "nll_weight": alpha if compute_nll_loss else 0.0, "gamma_beta_ratio": gamma / beta,
            "label_smoothing": label_smoothing,
        }  # fmt: skip

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the tuple that the head of this file describes.

        Args:
            lin_weight: (V, H) weight of the output layer.
            _input: (2B, T, H) hidden states, the chosen rows first.
            target: (2B, T) int64; `target[:, t]` is the token that `_input[:, t]` predicts.
            bias: (V,) bias of the output layer.
        """
        return _pairs(lin_weight, _input, target, bias, **self.options)


class LigerFusedLinearCPOLoss(nn.Module):
    """CPO. The tuple ends with chosen and rejected rewards.

    Args:
        ignore_index: The target of positions that are not scored; None: every position is scored.
        beta: Factor of the margin.
        alpha: Weight of the NLL of the chosen rows, if `compute_nll_loss`.
        label_smoothing: Probability that a label is wrong.
        compute_nll_loss: Whether the NLL is added to the loss.
        compiled: No effect.
        average_log_prob: Whether the loss is given averages per token instead of sums.
        chunk_size: No effect.
    """

    def __init__(
        self, ignore_index: int | None = -100, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
        compute_nll_loss: bool = True, compiled: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.options: dict[str, Any] = {
            "loss_type": "cpo", "average": average_log_prob, "ignore_index": ignore_index, "beta": beta,
            "nll_weight": alpha if compute_nll_loss else 0.0, "label_smoothing": label_smoothing,
        }  # fmt: skip

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the tuple that the head of this file describes.

        Args:
            lin_weight: (V, H) weight of the output layer.
            _input: (2B, T, H) hidden states, the chosen rows first.
            target: (2B, T) int64; `target[:, t]` is the token that `_input[:, t]` predicts.
            bias: (V,) bias of the output layer.
        """
        return _pairs(lin_weight, _input, target, bias, **self.options)


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO over single rows with a label each.

    Args:
        ignore_index: The target of positions that are not scored; None: every position is scored.
        beta: Strength of the pull to the reference.
        compiled: No effect.
        use_ref_model: Whether there is a reference. False: its log-probabilities count as 0.
        average_log_prob: Must be False: KTO is defined on sums.
        chunk_size: No effect.

    Raises:
        ConfigError: `average_log_prob` is True.
    """

    def __init__(
        self, ignore_index: int | None = -100, beta: float = 0.1, compiled: bool = True, use_ref_model: bool = False,
        average_log_prob: bool = False, chunk_size: int = 1,
    ):  # fmt: skip
        super().__init__()
        if average_log_prob:
            raise ConfigError("average_log_prob is True; KTO is defined on sums (arXiv:2402.01306): leave it False")
        self.ignore_index, self.beta, self.use_ref_model = ignore_index, beta, use_ref_model

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
            kl: KTO's reference point; None: 0.

        Raises:
            InputError: There are no labels, or shapes and dtypes do not fit.
        """
        if preference_labels is None:
            raise InputError("preference_labels is None; pass a (B,) bool tensor, True where the row is desirable")
        reference = _reference(self.use_ref_model, target, ref_input, ref_weight, ref_bias)
        options: dict[str, Any] = {"kl": 0.0 if kl is None else kl, "beta": self.beta, **reference}
        out = fused_linear_kto(
            _input, lin_weight, target, preference_labels, bias=bias, ignore_index=self.ignore_index, **options
        )
        each = (out.logps, _logits_sum(_input, lin_weight, bias), out.rewards)
        return out.loss, tuple(t[rows].sum() for t in each for rows in (preference_labels, ~preference_labels))
