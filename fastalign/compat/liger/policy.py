"""GRPO and the losses that Liger computes with it, from hidden states: `fastalign.losses.policy` has the formulas."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastalign.errors import ConfigError, InputError
from fastalign.losses import policy
from fastalign.ops import linear_logprobs
from fastalign.options import one_of

# How each loss is averaged.
REDUCTIONS: dict[str, policy.Reduction] = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dr_grpo": "fixed_length",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "sapo": "sequence_mean",
    "luspo": "length_weighted",
    "vespo": "token_mean",
}
# Divided by the tokens of the whole generation batch, if their number is given.
_GLOBAL_TOKENS = ("dapo", "cispo", "vespo")
_TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")

PolicyResult = tuple[Tensor, tuple[Tensor, ...]]


def get_gamma_weights(
    advantages: Tensor, log_ratio_per_token: Tensor, mask: Tensor, importance_sampling_ratio: Tensor | None = None,
    k_pos: float = 2.0, lambda_pos: float = 3.0, k_neg: float = 3.0, lambda_neg: float = 2.0,
) -> Tensor:  # fmt: skip
    """VESPO's weights (B, 1): `fastalign.losses.policy.vespo_weights` as Liger calls it.

    The arguments, in Liger's order:
        advantages, log_ratio_per_token, mask, importance_sampling_ratio, k_pos, lambda_pos, k_neg: As there.
        lambda_neg: As there.
    """
    return policy.vespo_weights(
        log_ratio_per_token, advantages, mask, sampler_ratio=importance_sampling_ratio, k_pos=k_pos,
        lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg,
    )  # fmt: skip


class LigerFusedLinearPPOBase:
    """What Liger's policy losses are built from: log-probabilities of the sampled tokens, and DAPO's divisor."""

    @staticmethod
    def chunk_forward(
        input_chunk: Tensor, weight: Tensor, selected_token_ids: Tensor, bias: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """(B, T) log-probabilities of tokens from hidden states.

        Args:
            input_chunk: (B, T, H) hidden states.
            weight: (V, H) weight of the output layer.
            selected_token_ids: (B, T) int64; the hidden states predict them.
            bias: (V,) bias of the output layer.
            temperature: What the logits are divided by.
        """
        return linear_logprobs(
            input_chunk, weight, selected_token_ids, bias=bias, temperature=float(temperature), ignore_index=None
        )

    @staticmethod
    def _compute_dapo_normalizer(attention_mask: Tensor, num_items_in_batch: float | Tensor | None = None) -> Tensor:
        """The scored tokens per process: of the whole generation batch if given, else of this batch. At least 1."""
        spread = dist.is_available() and dist.is_initialized()
        if num_items_in_batch is not None:
            total = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=attention_mask.device)
        else:
            total = attention_mask.sum(dtype=torch.float32)
            if spread:
                dist.all_reduce(total)
        return (total / (dist.get_world_size() if spread else 1)).clamp(min=1.0)


class _Sampled(NamedTuple):
    """What a loss is computed from: (B, T) tensors, and (B,) advantages."""

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    sampler_ratio: Tensor | None


def _check_options(loss_type: str, level: str, max_completion_length: int | None) -> None:
    one_of("loss_type", loss_type, REDUCTIONS)
    one_of("importance_sampling_level", level, ("token", "sequence"))
    if level == "sequence" and loss_type in _TOKEN_LEVEL_ONLY:
        raise ConfigError(
            f"Sequence-level importance sampling is not supported for loss_type={loss_type!r}; use "
            "importance_sampling_level='token' instead"
        )
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ConfigError(
            "max_completion_length is None; loss_type 'dr_grpo' divides by it: pass the longest completion"
        )


def _check_ranges(sapo_temperature_pos: float, sapo_temperature_neg: float, delta: float | None) -> None:
    for name, value in (("sapo_temperature_pos", sapo_temperature_pos), ("sapo_temperature_neg", sapo_temperature_neg)):
        if not value > 0:
            raise ConfigError(f"{name} must be positive, got {value!r}; the paper uses 1.0 and 1.05")
    if delta is not None and not delta > 0:
        raise ConfigError(f"delta must be positive, got {delta!r}; None means no bound")


def _sampler_ratio(ratio: Tensor | None, mask: Tensor) -> Tensor | None:
    """The correction for the sampler as (B, T) or (B, 1)."""
    if ratio is None:
        return None
    batch, length = mask.shape
    if tuple(ratio.shape) not in ((batch,), (batch, 1), (batch, length)):
        raise InputError(
            f"vllm_is_ratio is {tuple(ratio.shape)}; expected ({batch},), ({batch}, 1) or ({batch}, {length}): one per "
            "completion, or one per token"
        )
    return ratio.unsqueeze(1) if ratio.dim() == 1 else ratio


def _reference(
    score: Any, given: Tensor | None, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    if given is not None:
        if hidden is not None:
            warnings.warn(
                "Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.", stacklevel=4
            )
        return given
    if hidden is None or weight is None:
        raise InputError(
            "use_ref_model is True, but there is no reference; pass ref_per_token_logps, or ref_input with ref_weight"
        )
    with torch.no_grad():
        return score(hidden, weight, bias)


def _per_token(
    data: _Sampled, log_weights: Tensor, loss_type: str, clip: dict[str, Any], sapo: dict[str, float],
    vespo: dict[str, float],
) -> Tensor:  # fmt: skip
    """The loss of each token, or of each completion, before the KL."""
    if loss_type == "vespo":  # the sampler's correction enters the weights
        phi = policy.vespo_weights(log_weights, data.advantages, data.mask, sampler_ratio=data.sampler_ratio, **vespo)
        return -phi * data.advantages.unsqueeze(1) * data.logprobs
    if loss_type == "cispo":
        loss = policy.cispo(data.logprobs, log_weights, data.advantages, epsilon_high=clip["epsilon_high"])
    elif loss_type == "sapo":
        loss = policy.sapo(log_weights, data.advantages, **sapo)
    else:
        loss = policy.ppo_clip(log_weights, data.advantages, **clip)
    return loss if data.sampler_ratio is None else loss * data.sampler_ratio


def _clipped(log_weights: Tensor, advantages: Tensor, loss_type: str, low: float, high: float) -> Tensor:
    """Where clipping stops the gradient; SAPO and VESPO do not clip."""
    if loss_type in ("sapo", "vespo"):
        return torch.zeros_like(log_weights, dtype=torch.bool)
    if loss_type == "cispo":  # bounds the weight itself, from above only
        return policy.is_clipped(log_weights, advantages, epsilon_low=None, epsilon_high=high - 1)
    return policy.is_clipped(log_weights, advantages, epsilon_low=low, epsilon_high=high)


def liger_fused_linear_grpo(
    _input: Tensor, weight: Tensor, selected_token_ids: Tensor, attention_mask: Tensor, advantages: Tensor,
    bias: Tensor | None = None, ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    beta: float = 0.04, epsilon_low: float = 0.2, epsilon_high: float = 0.2, loss_type: str = "dapo",
    max_completion_length: int | None = None, importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, temperature: float = 1.0,
    compiled: bool = True, use_ref_model: bool = True, chunk_size: int = 1, vllm_is_ratio: Tensor | None = None,
    delta: float | None = None, use_bias_correction_kl: bool = False, vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0,
    num_items_in_batch: float | Tensor | None = None,
) -> PolicyResult:  # fmt: skip
    """GRPO and its relatives as a function: see `LigerFusedLinearGRPOLoss`.

    The arguments, in Liger's order:
        _input, weight, selected_token_ids, attention_mask, advantages, bias: As in the module's `forward`.
        ref_per_token_logps, old_per_token_logps, ref_input, ref_weight, ref_bias: As in the module's `forward`.
        beta, epsilon_low, epsilon_high, loss_type, max_completion_length: As in the module.
        importance_sampling_level, sapo_temperature_pos, sapo_temperature_neg, temperature: As in the module.
        compiled, use_ref_model, chunk_size, vllm_is_ratio, delta, use_bias_correction_kl: As in the module.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg, num_items_in_batch: As in the module.
    """
    _check_options(loss_type, importance_sampling_level, max_completion_length)
    # Liger's LUSPO does not mask: terms per token count at every position, scored or not.
    everywhere = loss_type == "luspo"
    targets = selected_token_ids if everywhere else selected_token_ids.masked_fill(attention_mask == 0, -100)

    def score(hidden: Tensor, layer: Tensor, layer_bias: Tensor | None) -> Tensor:
        return linear_logprobs(hidden, layer, targets, bias=layer_bias, temperature=float(temperature))

    logprobs = score(_input, weight, bias)
    dtype = logprobs.dtype
    mask = attention_mask.to(dtype)
    old = logprobs.detach() if old_per_token_logps is None else old_per_token_logps.to(dtype)
    data = _Sampled(logprobs, old, advantages.to(dtype), mask, _sampler_ratio(vllm_is_ratio, mask))
    counted = torch.ones_like(mask) if everywhere else mask
    weighed = mask if importance_sampling_level == "sequence" else counted
    level: Any = importance_sampling_level
    log_weights = policy.log_importance_weights(logprobs, old, weighed, level=level)
    per_token = _per_token(
        data, log_weights, loss_type,
        {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "delta": delta},
        {"temperature_pos": sapo_temperature_pos, "temperature_neg": sapo_temperature_neg},
        {"k_pos": vespo_k_pos, "lambda_pos": vespo_lambda_pos, "k_neg": vespo_k_neg, "lambda_neg": vespo_lambda_neg},
    )  # fmt: skip

    def mean(values: Tensor) -> Tensor:
        """The mean over scored tokens, for a metric."""
        return (values.detach() * mask).sum() / mask.sum().clamp(min=1.0)

    metrics = []
    if beta:
        ref = logprobs.detach()
        if use_ref_model:
            ref = _reference(score, ref_per_token_logps, ref_input, ref_weight, ref_bias).to(dtype)
        kl = policy.kl_to_reference(logprobs, ref, counted)
        if use_bias_correction_kl:
            kl = kl * log_weights.exp()
        per_token = per_token + beta * kl
        metrics.append(mean(kl))
    metrics.append(mean(_clipped(log_weights, data.advantages, loss_type, epsilon_low, epsilon_high)))
    num_items = None
    if loss_type in _GLOBAL_TOKENS:
        num_items = LigerFusedLinearPPOBase._compute_dapo_normalizer(attention_mask, num_items_in_batch)
    loss = policy.reduce_tokens(
        per_token, mask, REDUCTIONS[loss_type], num_items=num_items, max_length=max_completion_length
    )
    return loss, tuple(metrics)


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO, BNPO, Dr. GRPO, DAPO, CISPO, SAPO, LUSPO and VESPO over sampled completions.

    Args:
        beta: Weight of the KL to the reference; 0: none.
        compiled: No effect.
        use_ref_model: Whether there is a reference. False: the KL is 0.
        chunk_size: No effect.
        epsilon_low: How far the importance weight counts below 1.
        epsilon_high: How far it counts above 1; for "cispo" the bound itself.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: The longest completion that could be sampled; "dr_grpo" needs it.
        importance_sampling_level: "token", or "sequence" for one importance weight per completion (GSPO).
        sapo_temperature_pos: SAPO's temperature where the advantage is positive.
        sapo_temperature_neg: SAPO's temperature elsewhere.
        temperature: What the logits are divided by.
        delta: Bound of the importance weight where the advantage is negative; None: no bound.
        use_bias_correction_kl: Whether the KL is multiplied by the importance weight.
        vespo_k_pos: VESPO's k where the advantage is not negative.
        vespo_lambda_pos: VESPO's lambda there.
        vespo_k_neg: VESPO's k where the advantage is negative.
        vespo_lambda_neg: VESPO's lambda there.

    Raises:
        ConfigError: An option is unknown or out of range, or two do not fit together.
    """

    def __init__(
        self, beta: float = 0.04, compiled: bool = True, use_ref_model: bool = True, chunk_size: int = 1,
        epsilon_low: float = 0.2, epsilon_high: float = 0.2, loss_type: str = "dapo",
        max_completion_length: int | None = None, importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, temperature: float = 1.0,
        delta: float | None = None, use_bias_correction_kl: bool = False, vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0,
    ):  # fmt: skip
        super().__init__()
        one_of("loss_type", loss_type, REDUCTIONS)
        _check_ranges(sapo_temperature_pos, sapo_temperature_neg, delta)
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self, _input: Tensor, lin_weight: Tensor, selected_token_ids: Tensor, attention_mask: Tensor,
        advantages: Tensor, bias: Tensor | None = None, ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None, ref_input: Tensor | None = None, ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None, vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> PolicyResult:  # fmt: skip
        """The loss, and the metrics: the mean KL (unless beta is 0) and the share of tokens that are clipped.

        Args:
            _input: (B, T, H) hidden states of the policy.
            lin_weight: (V, H) weight of the output layer.
            selected_token_ids: (B, T) int64, the tokens that were sampled; the hidden states predict them.
            attention_mask: (B, T), not 0 where a token is scored.
            advantages: (B,) the advantages.
            bias: (V,) bias of the output layer.
            ref_per_token_logps: (B, T) log-probabilities under the reference.
            old_per_token_logps: (B, T) those under the policy that sampled; None: the policy itself.
            ref_input: (B, T, H) hidden states of the reference, instead of `ref_per_token_logps`.
            ref_weight: (V, H) the reference's output layer.
            ref_bias: (V,) its bias.
            vllm_is_ratio: (B,), (B, 1) or (B, T) the correction for a sampler with other probabilities.
            num_items_in_batch: Scored tokens of the whole generation batch over all processes, which "dapo", "cispo"
                and "vespo" divide by; None: those of this batch.

        Raises:
            ConfigError: Two options do not fit together.
            InputError: Shapes or dtypes do not fit, or the reference is missing.
        """
        return liger_fused_linear_grpo(
            _input, lin_weight, selected_token_ids, attention_mask, advantages, bias, ref_per_token_logps,
            old_per_token_logps, ref_input, ref_weight, ref_bias, self.beta, self.epsilon_low, self.epsilon_high,
            self.loss_type, self.max_completion_length, self.importance_sampling_level, self.sapo_temperature_pos,
            self.sapo_temperature_neg, self.temperature, self.compiled, self.use_ref_model, self.chunk_size,
            vllm_is_ratio, self.delta, self.use_bias_correction_kl, self.vespo_k_pos, self.vespo_lambda_pos,
            self.vespo_k_neg, self.vespo_lambda_neg, num_items_in_batch,
        )  # fmt: skip


class LigerFusedLinearGRPOFunction(LigerFusedLinearPPOBase):
    """`apply` is `liger_fused_linear_grpo`."""

    apply = staticmethod(liger_fused_linear_grpo)
