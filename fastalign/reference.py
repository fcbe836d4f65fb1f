"""Plain PyTorch definitions of every op: the truth that the fast versions are held to.

Each function here materialises what the fast one avoids (the `[tokens, vocabulary]` logits, most of all), accepts
float64, and computes low-precision inputs in float32. Read this file to know what an op means.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype an op computes in: float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`softcap * tanh(s * (h W' + b) / softcap) / temperature`, or `s * (h W' + b) / temperature` without a cap.

    hidden (..., H), weight (V, H), bias (V,) -> logits (..., V), float32 (float64 for float64 inputs).
    """
    dtype = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the product to 16 bits
        z = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def selective_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, ignore_index: int | None = -100
) -> Tensor:
    """`z_y - logsumexp(z)` with `z = logits / temperature`; 0 where the target is `ignore_index`.

    logits (..., V), targets (...) int64 -> (...) float32 (float64 for float64 logits).
    """
    ignored = _ignored(targets, ignore_index)
    logprobs = torch.log_softmax(logits.to(compute_dtype(logits)) / temperature, dim=-1)
    picked = logprobs.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(ignored, 0.0)


def _ignored(targets: Tensor, ignore_index: int | None) -> Tensor:
    return torch.zeros_like(targets, dtype=torch.bool) if ignore_index is None else targets == ignore_index


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int | None = ...,
    entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int | None = ...,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int | None = ...,
    entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Token log-probabilities `z_y - logsumexp(z)` of `z = linear_logits(...)`, and the entropy `-sum p log p` of p.

    hidden (..., H), weight (V, H), bias (V,), targets (...) int64 -> (...) float32 (float64 for float64 inputs).
    """
    z = linear_logits(hidden, weight, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    logprobs = selective_logprobs(z, targets, ignore_index=ignore_index)
    if not entropy:
        return logprobs
    log_p = torch.log_softmax(z, dim=-1)
    p_log_p = log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)  # a masked entry (-inf) adds nothing
    return logprobs, (-p_log_p.sum(-1)).masked_fill(_ignored(targets, ignore_index), 0.0)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`out[i] = sum(values[cu_seqlens[i] : cu_seqlens[i + 1]])`; values (N,), cu_seqlens (S + 1,) -> (S,)."""
    bounds = cu_seqlens.tolist()
    sums = [values[start:end].sum() for start, end in pairwise(bounds)]
    return torch.stack(sums) if sums else values.new_zeros(0)


def logits_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
) -> Tensor:
    """Divergence of two next-token distributions, per token: `(..., V)` logits -> `(...)`.

    With s, t the student's and teacher's softmax at `temperature` and `m = jsd_beta * t + (1 - jsd_beta) * s`:
    forward_kl `KL(t || s)`, reverse_kl `KL(s || t)`, jsd `jsd_beta * KL(t || m) + (1 - jsd_beta) * KL(s || m)`
    (Agarwal et al. 2024, arXiv:2306.13649).
    """
    dtype = compute_dtype(student_logits, teacher_logits)
    s = torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    t = torch.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)
    return divergence_of_logprobs(s, t, divergence, jsd_beta)


def _expect(log_p: Tensor, difference: Tensor) -> Tensor:
    """`sum_j p_j difference_j`, where an entry of probability 0 (a masked one) adds nothing."""
    return (log_p.exp() * difference.masked_fill(log_p.isneginf(), 0.0)).sum(-1)


def divergence_of_logprobs(s: Tensor, t: Tensor, divergence: str, jsd_beta: float) -> Tensor:
    """The divergence of two distributions given by their log-probabilities (..., V)."""
    if divergence == "forward_kl":
        return _expect(t, t - s)
    if divergence == "reverse_kl":
        return _expect(s, s - t)
    if divergence != "jsd":
        raise ValueError(f"divergence is {divergence!r}; it must be one of {DIVERGENCES}")
    m = (jsd_beta * t.exp() + (1 - jsd_beta) * s.exp()).clamp(min=torch.finfo(s.dtype).tiny).log()
    return jsd_beta * _expect(t, t - m) + (1 - jsd_beta) * _expect(s, s - m)


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
) -> Tensor:
    """`logits_divergence` of `linear_logits(hidden, weight)` and `linear_logits(teacher_hidden, teacher_weight)`.

    hidden (..., H), weight (V, H), teacher_hidden (..., G), teacher_weight (U, G) -> (...); 0 where the mask is False.
    Of vocabularies that differ in length the shorter one counts. The teacher is a constant.
    """
    vocab = min(weight.shape[0], teacher_weight.shape[0])
    bias, teacher_bias = (b if b is None else b[:vocab] for b in (bias, teacher_bias))
    z = linear_logits(hidden, weight[:vocab], bias=bias, logit_scale=logit_scale, softcap=softcap)
    with torch.no_grad():
        teacher_z = linear_logits(
            teacher_hidden, teacher_weight[:vocab], bias=teacher_bias, logit_scale=teacher_logit_scale,
            softcap=teacher_softcap,
        )  # fmt: skip
    out = logits_divergence(z, teacher_z, divergence=divergence, temperature=temperature, jsd_beta=jsd_beta)
    return out if mask is None else out.masked_fill(~mask, 0.0)


def accumulate_fisher(fisher: Tensor, grad_output: Tensor, inputs: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`F + sum_s (G_s' X_s)^2`, G_s and X_s the rows `cu_seqlens[s]` to `cu_seqlens[s + 1]` of grad_output and inputs.

    fisher (out, in), grad_output (T, out), inputs (T, in), cu_seqlens (S + 1,) -> (out, in). `G_s' X_s` is the gradient
    of sequence s in the weight of a linear layer: the result is F plus the sum of squared per-sequence gradients.
    """
    dtype = compute_dtype(fisher, grad_output, inputs)
    out = fisher.to(dtype, copy=True)
    for start, end in pairwise(cu_seqlens.tolist()):
        out += (grad_output[start:end].to(dtype).T @ inputs[start:end].to(dtype)) ** 2
    return out


def ewc_penalty(parameters, anchors, fishers, strength: float = 1.0) -> Tensor:
    """`strength / 2 * sum_i F_i (theta_i - theta0_i)^2` over lists of tensors; fishers None: F = 1. A scalar."""
    dtype = compute_dtype(*parameters, *anchors)
    fishers = [1.0] * len(parameters) if fishers is None else [f.to(dtype) for f in fishers]
    terms = zip(parameters, anchors, fishers, strict=True)
    return strength / 2 * sum((f * (p.to(dtype) - a.to(dtype)) ** 2).sum() for p, a, f in terms)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x w / sqrt(mean(x^2) + eps)`, the mean over the last dimension. x (..., H), weight (H,) -> (..., H)."""
    x = x.to(compute_dtype(x, weight))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` with `silu(g) = g / (1 + exp(-g))`, of one shape: SwiGLU between its products."""
    gate = gate.to(compute_dtype(gate, up))
    return gate * torch.sigmoid(gate) * up


def seen_keys(segments: Tensor, window: int | None = None) -> Tensor:
    """Which keys each token of a packed row sees, (T, T) bool.

    segments (S, 4): first token, length, first token of the prefix and its length. A token sees the prefix of its
    segment and then its segment up to itself; of these, with a window, the last `window`.
    """
    tokens = int(segments[:, 1].sum())
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, length, prefix_start, prefix in segments.tolist():
        key = torch.arange(prefix + length)
        query = key[prefix:, None]
        sees = (key <= query) & (key > query - (window or tokens))
        own = slice(start, start + length)
        seen[own, prefix_start : prefix_start + prefix] = sees[:, :prefix]
        seen[own, own] = sees[:, prefix:]
    return seen


def segment_attention(query, key, value, segments: Tensor, window: int | None, scaling: float) -> Tensor:
    """`softmax(scaling q k') v`, each token over `seen_keys`.

    query (1, heads, T, D), key (1, key_heads, T, D), value (1, key_heads, T, Dv) -> (1, T, heads, Dv). A key head
    serves heads / key_heads heads in a row.
    """
    dtype, shared = compute_dtype(query, key, value), query.shape[1] // key.shape[1]
    k, v = (t.to(dtype).repeat_interleave(shared, 1) for t in (key, value))
    scores = scaling * query.to(dtype) @ k.transpose(-1, -2)
    probs = scores.masked_fill(~seen_keys(segments, window), -torch.inf).softmax(-1)
    return (probs @ v).transpose(1, 2)


def with_tail(logprobs: Tensor) -> Tensor:
    """Log-probabilities (..., k) of some entries, and behind them that of all others, `log(1 - sum exp)`.

    (..., k) -> (..., k + 1). The tail is 1e-7 at least: the sum is rounded, and a tail of 0 would make a KL infinite.
    """
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([logprobs, rest.log()], -1)


def sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tail: str = "lump",
) -> Tensor:
    """Divergence over the teacher's top k entries and, unless tail is "drop", all others as one bucket.

    hidden (..., H), weight (V, H), teacher_indices and teacher_logprobs (..., k) -> (...); 0 where the mask is False.
    """
    z = linear_logits(hidden, weight, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    out = sparse_logits_divergence(
        z, teacher_indices, teacher_logprobs, divergence=divergence, jsd_beta=jsd_beta, tail=tail
    )
    return out if mask is None else out.masked_fill(~mask, 0.0)


def sparse_logits_divergence(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    tail: str = "lump",
) -> Tensor:
    """The same from the student's logits (..., V)."""
    z = student_logits.to(compute_dtype(student_logits)) / temperature
    log_p = torch.log_softmax(z, dim=-1)
    s, t = log_p.gather(-1, teacher_indices), teacher_logprobs.to(z.dtype)
    if tail == "lump" and t.shape[-1] < z.shape[-1]:
        others = log_p.scatter(-1, teacher_indices, -torch.inf).logsumexp(-1, keepdim=True)
        s, t = torch.cat([s, others], -1), with_tail(t)
    return divergence_of_logprobs(s, t, divergence, jsd_beta)
