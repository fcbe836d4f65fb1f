"""Losses over pairs: DPO and its relatives, ORPO, SimPO, CPO.

Inputs are padded, chosen rows first: `_input` (2B, T, H), `target` (2B, T). All return
`(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
rejected_rewards, ...))`; `nll_loss` is 0 where `compute_nll_loss` is False.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastalign.compat.liger.shared import logits_sum, reference_arguments
from fastalign.errors import ConfigError
from fastalign.fused import fused_linear_preference, have_target
from fastalign.losses import canonical
from fastalign.losses.numerics import log1mexp
from fastalign.options import nearest

PreferenceResult = tuple[Tensor, tuple[Tensor, ...]]
LOSS_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip


def _pairs(
    weight: Tensor,
    hidden: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    loss_type: str,
    average: bool,
    ignore_index: int | None,
    compute_nll_loss: bool,
    alpha: float = 1.0,
    **options: Any,
) -> PreferenceResult:
    """What Liger's losses over pairs return, rewards last."""
    name = canonical(loss_type)
    out = fused_linear_preference(
        hidden, weight, target, bias=bias, loss_type=name, length_normalised={name} if average else (),
        ignore_index=ignore_index, nll_weight=alpha if compute_nll_loss else 0.0, **options,
    )  # fmt: skip
    logps, rewards = list(out[1:3]), list(out[3:5])
    if average:
        lengths = have_target(target, ignore_index).sum(1).chunk(2)
        logps = [sums / length for sums, length in zip(logps, lengths, strict=True)]
        rewards = [sums / length for sums, length in zip(rewards, lengths, strict=True)]
    entries = target.shape[0] // 2 * target.shape[1] * weight.shape[0]
    means = [half.sum() / entries for half in logits_sum(hidden, weight, bias).chunk(2)]
    nll = out.nll if compute_nll_loss else torch.zeros_like(out.nll)
    return out.loss, (*logps, *means, nll, *rewards)


def _check_dpo(loss_type: str, label_smoothing: float) -> None:
    if loss_type not in LOSS_TYPES:
        raise ConfigError(
            f"Unsupported loss_type: {loss_type!r}; {nearest(str(loss_type), LOSS_TYPES)} "
            "(fastalign.fused_linear_preference has more losses)"
        )
    if loss_type == "exo_pair" and not label_smoothing > 0:
        raise ConfigError(
            f"label_smoothing must be > 0 for loss_type='exo_pair'; got {label_smoothing!r}: the paper uses 1e-3"
        )
    if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust'; got {label_smoothing!r}: pass the "
            "probability that a label is wrong"
        )


def liger_fused_linear_dpo(
    _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None, ref_bias: Tensor | None = None, ignore_index: int | None = -100,
    beta: float = 0.1, compute_nll_loss: bool = False, compiled: bool = True, use_ref_model: bool = True,
    average_log_prob: bool = False, chunk_size: int = 1, loss_type: str = "sigmoid", label_smoothing: float = 0.0,
    discopop_tau: float = 0.05, alpha: float = 1.0,
) -> PreferenceResult:  # fmt: skip
    """DPO and its relatives as a function: see `LigerFusedLinearDPOLoss`.

    The arguments, in Liger's order:
        _input, weight, target, bias, ref_input, ref_weight, ref_bias: As in the module's `forward`.
        ignore_index, beta, compute_nll_loss, compiled, use_ref_model, average_log_prob, chunk_size: As in the module.
        loss_type, label_smoothing, discopop_tau, alpha: As in the module.
    """
    _check_dpo(loss_type, label_smoothing)
    options: dict[str, Any] = dict(reference_arguments(use_ref_model, target, ref_input, ref_weight, ref_bias))
    if loss_type in ("robust", "exo_pair"):  # the only two whose labels Liger smooths
        options["label_smoothing"] = label_smoothing
    if loss_type == "discopop":
        options["discopop_tau"] = discopop_tau
    return _pairs(
        weight, _input, target, bias, loss_type=loss_type, average=average_log_prob, ignore_index=ignore_index,
        beta=beta, compute_nll_loss=compute_nll_loss, alpha=alpha, **options,
    )  # fmt: skip


def liger_fused_linear_orpo(
    _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ignore_index: int | None = -100,
    beta: float = 0.1, compute_nll_loss: bool = True, nll_target: Tensor | None = None, compiled: bool = True,
    chunk_size: int = 1,
) -> PreferenceResult:  # fmt: skip
    """ORPO as a function: see `LigerFusedLinearORPOLoss`.

    The arguments, in Liger's order:
        _input, weight, target, bias: As in the module's `forward`.
        ignore_index, beta, compute_nll_loss, nll_target, compiled, chunk_size: As in the module.
    """
    loss, aux = _pairs(
        weight, _input, target, bias, nll_targets=nll_target if compute_nll_loss else None, loss_type="orpo",
        average=True, ignore_index=ignore_index, beta=beta, compute_nll_loss=compute_nll_loss,
    )  # fmt: skip
    chosen, rejected = aux[:2]
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return loss, (*aux, nn.functional.logsigmoid(log_odds).mean(), log_odds.mean())


def liger_fused_linear_simpo(
    _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ignore_index: int | None = -100,
    beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0, compute_nll_loss: bool = False,
    compiled: bool = True, gamma: float = 0.5, chunk_size: int = 1,
) -> PreferenceResult:  # fmt: skip
    """SimPO as a function: see `LigerFusedLinearSimPOLoss`. As in Liger, only the module adds the NLL by default.

    The arguments, in Liger's order:
        _input, weight, target, bias: As in the module's `forward`.
        ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, gamma, chunk_size: As in the module.
    """
    return _pairs(
        weight, _input, target, bias, loss_type="simpo", average=True, ignore_index=ignore_index, beta=beta,
        gamma_beta_ratio=gamma / beta if beta else 0.0, label_smoothing=label_smoothing, alpha=alpha,
        compute_nll_loss=compute_nll_loss,
    )  # fmt: skip


def liger_fused_linear_cpo(
    _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ignore_index: int | None = -100,
    beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0, compute_nll_loss: bool = True,
    compiled: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
) -> PreferenceResult:  # fmt: skip
    """CPO as a function: see `LigerFusedLinearCPOLoss`.

    The arguments, in Liger's order:
        _input, weight, target, bias: As in the module's `forward`.
        ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, average_log_prob: As in the module.
        chunk_size: As in the module.
    """
    return _pairs(
        weight, _input, target, bias, loss_type="cpo", average=average_log_prob, ignore_index=ignore_index, beta=beta,
        label_smoothing=label_smoothing, alpha=alpha, compute_nll_loss=compute_nll_loss,
    )  # fmt: skip


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

    Raises:
        ConfigError: Liger has no such loss, or `label_smoothing` does not fit it.
    """

    def __init__(
        self, ignore_index: int | None = -100, beta: float = 0.1, alpha: float = 1.0, compute_nll_loss: bool = False,
        compiled: bool = True, use_ref_model: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
        loss_type: str = "sigmoid", label_smoothing: float = 0.0, discopop_tau: float = 0.05,
    ):  # fmt: skip
        super().__init__()
        _check_dpo(loss_type, label_smoothing)
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    ) -> PreferenceResult:  # fmt: skip
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
        return liger_fused_linear_dpo(
            _input, lin_weight, target, bias, ref_input, ref_weight, ref_bias, ignore_index=self.ignore_index,
            beta=self.beta, compute_nll_loss=self.compute_nll_loss, use_ref_model=self.use_ref_model,
            average_log_prob=self.average_log_prob, loss_type=self.loss_type, label_smoothing=self.label_smoothing,
            discopop_tau=self.discopop_tau, alpha=self.alpha,
        )  # fmt: skip


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
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> PreferenceResult:  # fmt: skip
        """The loss and the tuple that the head of this file describes, with the three entries of the class.

        Args:
            lin_weight: (V, H) weight of the output layer.
            _input: (2B, T, H) hidden states, the chosen rows first.
            target: (2B, T) int64; `target[:, t]` is the token that `_input[:, t]` predicts.
            bias: (V,) bias of the output layer.
            nll_target: (2B, T) int64, the tokens that the NLL counts; None: those of `target`.
        """
        return liger_fused_linear_orpo(
            _input, lin_weight, target, bias, ignore_index=self.ignore_index, beta=self.beta,
            compute_nll_loss=self.compute_nll_loss, nll_target=nll_target,
        )  # fmt: skip


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
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.gamma = gamma
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> PreferenceResult:
        """The loss and the tuple that the head of this file describes.

        Args:
            lin_weight: (V, H) weight of the output layer.
            _input: (2B, T, H) hidden states, the chosen rows first.
            target: (2B, T) int64; `target[:, t]` is the token that `_input[:, t]` predicts.
            bias: (V,) bias of the output layer.
        """
        return liger_fused_linear_simpo(
            _input, lin_weight, target, bias, ignore_index=self.ignore_index, beta=self.beta, alpha=self.alpha,
            label_smoothing=self.label_smoothing, compute_nll_loss=self.compute_nll_loss, gamma=self.gamma,
        )  # fmt: skip


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
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> PreferenceResult:
        """The loss and the tuple that the head of this file describes.

        Args:
            lin_weight: (V, H) weight of the output layer.
            _input: (2B, T, H) hidden states, the chosen rows first.
            target: (2B, T) int64; `target[:, t]` is the token that `_input[:, t]` predicts.
            bias: (V,) bias of the output layer.
        """
        return liger_fused_linear_cpo(
            _input, lin_weight, target, bias, ignore_index=self.ignore_index, beta=self.beta, alpha=self.alpha,
            label_smoothing=self.label_smoothing, compute_nll_loss=self.compute_nll_loss,
            average_log_prob=self.average_log_prob,
        )  # fmt: skip


class LigerFusedLinearDPOFunction:
    """`apply` is `liger_fused_linear_dpo`."""

    apply = staticmethod(liger_fused_linear_dpo)


class LigerFusedLinearORPOFunction:
    """`apply` is `liger_fused_linear_orpo`."""

    apply = staticmethod(liger_fused_linear_orpo)


class LigerFusedLinearSimPOFunction:
    """`apply` is `liger_fused_linear_simpo`."""

    apply = staticmethod(liger_fused_linear_simpo)


class LigerFusedLinearCPOFunction:
    """`apply` is `liger_fused_linear_cpo`."""

    apply = staticmethod(liger_fused_linear_cpo)
