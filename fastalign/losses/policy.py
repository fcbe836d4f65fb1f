"""Policy-gradient losses per token, and how they are averaged: PPO's clipping, CISPO, SAPO, VESPO.

The formulas use these symbols, all per token unless they say otherwise:

    l, o, r     log-probabilities under the policy, under the policy that sampled ("old"), under the reference
    A           the advantage of the completion that the token belongs to
    w           exp(l - o), the importance weight; with level "sequence" one per completion:
                exp(mean over its scored tokens of l - o), as in GSPO
    s(x)        1 / (1 + exp(-x)), the logistic sigmoid

What the functions have in common:

- Tensors are float32 or float64. Those per token are (B, T), those per completion (B,). Positions where `mask` is 0 are
  not scored: what stands there has no effect, and gets no gradient.
- Before an exponential, log-ratios are bounded where the dtype's largest number is near (74 in float32). The loss stays
  finite, and tokens beyond the bound get no gradient.
- `o` and `r` are constants: gradients reach `l` alone.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses.checks import describe
from fastalign.options import nearest

Level = Literal["token", "sequence"]
Reduction = Literal["sequence_mean", "token_mean", "fixed_length", "length_weighted"]

# VESPO's bounds of a log-ratio: the importance weight of a completion stays within [1e-8, exp(20)].
_LOWEST, _HIGHEST = math.log(1e-8), 20.0


def _check_name(argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{argument} is {value!r}; {nearest(str(value), allowed)}")


def _check_tokens(mask: Tensor, advantages: Tensor | None = None, **per_token: Tensor | None) -> None:
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != mask.shape:
            raise InputError(
                f"{name} is {describe(tensor)}, but mask is {describe(mask)}; pass one entry per token in each, (B, T)."
            )
    if advantages is not None and advantages.shape != mask.shape[:1]:
        raise InputError(
            f"advantages is {describe(advantages)}, but mask is {describe(mask)}; pass one per completion, (B,)."
        )


def _bounded(log_ratio: Tensor) -> Tensor:
    """The log-ratio where its exponential, and the gradient of it, are still finite."""
    return log_ratio.clamp(max=math.log(torch.finfo(log_ratio.dtype).max) - 14)


def log_importance_weights(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, level: Level = "token") -> Tensor:
    """Logarithm of the importance weights, per token or per completion.

        token:     l - o
        sequence:  mean over the scored tokens of a completion of l - o

    Args:
        logprobs: (B, T) log-probabilities of the sampled tokens under the policy.
        old_logprobs: (B, T) those under the policy that sampled them.
        mask: (B, T), not 0 where a token is scored.
        level: "token" or "sequence".

    Returns:
        (B, T), 0 where a token is not scored; for "sequence" (B, 1).

    Raises:
        InputError: The shapes differ, or `level` is unknown.

    References:
        Level "sequence", GSPO: Zheng et al. 2025, arXiv:2507.18071.
    """
    _check_name("level", level, get_args(Level))
    _check_tokens(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(mask == 0, 0.0)
    if level == "token":
        return log_ratio
    return (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1.0)


def ppo_clip(
    log_weights: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
) -> Tensor:
    """PPO's clipped loss, which GRPO, DAPO, Dr. GRPO, BNPO and LUSPO take per token.

        L = -min(min(w, delta) A, clip(w, 1 - epsilon_low, 1 + epsilon_high) A)

    Args:
        log_weights: (B, T) or (B, 1) log w, from `log_importance_weights`.
        advantages: (B,) the advantages.
        epsilon_low: How far w counts below 1.
        epsilon_high: How far w counts above 1.
        delta: Bound of w where A is negative ("two-sided clipping"), above 0; None: no bound.

    Returns:
        The loss per token, shaped like `log_weights`.

    Raises:
        InputError: `delta` is not above 0.

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7; the bounds apart: DAPO, arXiv:2503.14476; delta: INTELLECT-2,
        arXiv:2505.07291.
    """
    if delta is not None and not delta > 0:
        raise InputError(
            f"delta is {delta!r}; expected a bound of the importance weight above 0, or None for no bound."
        )
    weights, each = _bounded(log_weights).exp(), advantages.unsqueeze(1)
    clipped = weights.clamp(1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:
        weights = weights.clamp(max=delta)
    return -torch.minimum(weights * each, clipped * each)


def is_clipped(
    log_weights: Tensor, advantages: Tensor, *, epsilon_low: float | None = 0.2, epsilon_high: float = 0.2
) -> Tensor:
    """Where the clipping of `ppo_clip` stops the gradient.

        (w < 1 - epsilon_low and A < 0) or (w > 1 + epsilon_high and A > 0)

    Args:
        log_weights: (B, T) or (B, 1) log w.
        advantages: (B,) the advantages.
        epsilon_low: As for `ppo_clip`; None: there is no lower bound.
        epsilon_high: As for `ppo_clip`.

    Returns:
        A bool tensor shaped like `log_weights`.
    """
    weights, each = _bounded(log_weights.detach()).exp(), advantages.unsqueeze(1)
    above = (weights > 1 + epsilon_high) & (each > 0)
    return above if epsilon_low is None else above | ((weights < 1 - epsilon_low) & (each < 0))


def cispo(logprobs: Tensor, log_weights: Tensor, advantages: Tensor, *, epsilon_high: float = 0.2) -> Tensor:
    """CISPO: the importance weight is bounded and constant, so that every token keeps a gradient.

        L = -min(w, epsilon_high) A l      without gradient through w

    Args:
        logprobs: (B, T) l.
        log_weights: (B, T) log w.
        advantages: (B,) the advantages.
        epsilon_high: Bound of w itself, as in TRL and Liger: not 1 + epsilon_high. The usual value is 5.

    Returns:
        (B, T) the loss per token.

    References:
        MiniMax-M1, arXiv:2506.13585.
    """
    bounded = _bounded(log_weights.detach()).exp().clamp(max=epsilon_high)
    return -bounded * advantages.unsqueeze(1) * logprobs


def sapo(
    log_weights: Tensor, advantages: Tensor, *, temperature_pos: float = 1.0, temperature_neg: float = 1.05
) -> Tensor:
    """SAPO: a soft gate around w = 1 instead of clipping.

        L = -A (4 / tau) s(tau (w - 1))      tau = temperature_pos where A > 0, else temperature_neg

    Args:
        log_weights: (B, T) log w.
        advantages: (B,) the advantages.
        temperature_pos: tau of completions with a positive advantage, above 0.
        temperature_neg: tau of the others, above 0.

    Returns:
        (B, T) the loss per token.

    Raises:
        InputError: A temperature is not above 0.

    References:
        Gao et al. 2025, arXiv:2511.20347.
    """
    for name, value in (("temperature_pos", temperature_pos), ("temperature_neg", temperature_neg)):
        if not value > 0:
            raise InputError(f"{name} is {value!r}; expected a number above 0: the paper uses 1.0 and 1.05.")
    each = advantages.unsqueeze(1)
    # new_full: `torch.where` of two numbers would round them to float32.
    tau = log_weights.new_full(each.shape, temperature_pos).where(each > 0, temperature_neg)
    # The gate is saturated long before the exponential could overflow: its gradient there is 0 in any case.
    weights = _bounded(log_weights).exp()
    return -each * torch.sigmoid(tau * (weights - 1)) * 4 / tau


def vespo_weights(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    sampler_ratio: Tensor | None = None,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """VESPO's weight of a completion, from its importance weight.

        phi(W) = exp(lambda) W^k exp(-lambda W)      W = exp(sum over scored tokens of l - o), phi(1) = 1

    Args:
        log_ratio: (B, T) l - o per token.
        advantages: (B,) the advantages: k and lambda are `_pos` where A >= 0, else `_neg`.
        mask: (B, T), not 0 where a token is scored.
        sampler_ratio: (B, T) or (B, 1) the correction for a sampler whose probabilities differ from the old policy's,
            p_old / p_sampler; it multiplies W.
        k_pos: k where A >= 0.
        lambda_pos: lambda where A >= 0.
        k_neg: k where A < 0.
        lambda_neg: lambda where A < 0.

    Returns:
        (B, 1) the weights, without gradient. log W is bounded to [log 1e-8, 20], each token's share of it to +-20.
    """
    with torch.no_grad():
        log_w = (log_ratio.masked_fill(mask == 0, 0.0).clamp(-_HIGHEST, _HIGHEST) * mask).sum(1, keepdim=True)
        if sampler_ratio is not None:
            log_w = log_w + sampler_ratio.log().clamp(_LOWEST, _HIGHEST).sum(1, keepdim=True)
        log_w = log_w.clamp(_LOWEST, _HIGHEST)
        positive = advantages.unsqueeze(1) >= 0
        k = log_w.new_full(log_w.shape, k_pos).where(positive, k_neg)
        rate = log_w.new_full(log_w.shape, lambda_pos).where(positive, lambda_neg).clamp(min=1e-4)
        return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token, at least 0 and unbiased for tokens that the policy sampled.

        exp(r - l) - (r - l) - 1

    Args:
        logprobs: (B, T) l.
        ref_logprobs: (B, T) r.
        mask: (B, T), not 0 where a token is scored.

    Returns:
        (B, T) nats, 0 where a token is not scored.

    Raises:
        InputError: The shapes differ.

    References:
        The estimator k3 of Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    _check_tokens(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    ratio = (ref_logprobs.detach() - logprobs).masked_fill(mask == 0, 0.0)
    # expm1 keeps the digits where policy and reference nearly agree.
    return torch.expm1(_bounded(ratio)) - ratio


def reduce_tokens(
    per_token: Tensor,
    mask: Tensor,
    reduction: Reduction,
    *,
    num_items: float | Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """One loss from the losses per token.

        sequence_mean    mean over completions of the mean over their tokens      GRPO, SAPO
        token_mean       sum over tokens / num_items                              BNPO, DAPO, CISPO, VESPO
        fixed_length     sum over tokens / (B max_length)                         Dr. GRPO
        length_weighted  mean over tokens of loss * length of its completion      LUSPO

    Args:
        per_token: (B, T) losses, or (B, 1) where all tokens of a completion share one.
        mask: (B, T), not 0 where a token is scored.
        reduction: A name above.
        num_items: Number of scored tokens to divide by in "token_mean"; None: those of `mask`.
        max_length: Longest completion that could be sampled; "fixed_length" needs it.

    Returns:
        A scalar.

    Raises:
        InputError: The reduction is unknown, or `max_length` is missing.
    """
    _check_name("reduction", reduction, get_args(Reduction))
    lengths = mask.sum(1, keepdim=True)
    if reduction == "length_weighted":
        # The mean is over per_token's entries: with one weight per completion those are the B completions.
        return (per_token * lengths).mean()
    scored = torch.where(mask != 0, per_token, 0.0) * mask
    if reduction == "sequence_mean":
        return (scored.sum(1, keepdim=True) / lengths.clamp(min=1.0)).mean()
    if reduction == "token_mean":
        return scored.sum() / (lengths.sum().clamp(min=1.0) if num_items is None else num_items)
    if max_length is None:
        raise InputError("max_length is None; reduction 'fixed_length' divides by it: pass the longest completion.")
    return scored.sum() / (mask.shape[0] * max_length)
