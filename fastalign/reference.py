"""Plain PyTorch definitions of every op: the truth that the fast versions are tested against.

This is not the reference model of preference optimisation: `fastalign/training/reference.py` is about that. Read this
file to know what an op means. Each function holds in memory what the fast one avoids, above all the
`[tokens, vocabulary]` logits. float64 inputs are computed and returned in float64, all others in float32.

Shapes: `...` any leading dimensions, H width of the hidden states, V vocabulary, T tokens of a packed row, S sequences
in it. `cu_seqlens` (S + 1,) are the offsets of the sequences: sequence i is the tokens `cu_seqlens[i]` to
`cu_seqlens[i + 1]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args, overload

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
Tail = Literal["lump", "drop"]  # of the vocabulary, beyond the entries that a teacher names


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that an op computes in: float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def linear_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0,
    softcap: float | None = None, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """The logits of an output layer.

        u = logit_scale * (hidden weight' + bias)
        z = softcap * tanh(u / softcap) / temperature, or u / temperature without a cap

    Args:
        hidden: (..., H) floating.
        weight: (V, H) floating.
        bias: (V,) floating.
        logit_scale: Factor of the product.
        softcap: Bound of the logits' size (Gemma 2); None: no bound.
        temperature: What the logits are divided by, after the cap.

    Returns:
        (..., V) float32, or float64 for float64 inputs.
    """
    dtype = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the product to 16 bits
        z = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def selective_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, ignore_index: int | None = -100
) -> Tensor:
    """Token log-probabilities from logits.

        log p(y) = z_y - logsumexp(z)  with  z = logits / temperature

    Args:
        logits: (..., V) floating.
        targets: (...) int64.
        temperature: What the logits are divided by.
        ignore_index: The target of positions whose result is 0; None: there are none.

    Returns:
        (...) float32 in nats, or float64 for float64 logits.
    """
    ignored = _ignored(targets, ignore_index)
    logprobs = torch.log_softmax(logits.to(compute_dtype(logits)) / temperature, dim=-1)
    picked = logprobs.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(ignored, 0.0)


def _ignored(targets: Tensor, ignore_index: int | None) -> Tensor:
    return torch.zeros_like(targets, dtype=torch.bool) if ignore_index is None else targets == ignore_index


@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ..., logit_scale: float = ...,
    softcap: float | None = ..., temperature: float = ..., ignore_index: int | None = ...,
    entropy: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ..., logit_scale: float = ...,
    softcap: float | None = ..., temperature: float = ..., ignore_index: int | None = ..., entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ..., logit_scale: float = ...,
    softcap: float | None = ..., temperature: float = ..., ignore_index: int | None = ..., entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0,
    softcap: float | None = None, temperature: float = 1.0, ignore_index: int | None = -100, entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Token log-probabilities from hidden states, and the entropy of their distributions.

        log p(y) = z_y - logsumexp(z)  with  z = linear_logits(hidden, weight, ...)
        entropy = -sum_j p_j log p_j

    Args:
        hidden: (..., H) floating.
        weight: (V, H) floating.
        targets: (...) int64; `targets[..., t]` is the token that `hidden[..., t]` predicts.
        bias: (V,) floating.
        logit_scale: As for `linear_logits`.
        softcap: As for `linear_logits`.
        temperature: As for `linear_logits`.
        ignore_index: The target of positions whose results are 0; None: there are none.
        entropy: Whether to return the entropies as well.

    Returns:
        (...) log-probabilities in nats, float32 or float64; with `entropy` also the entropies, shaped alike.
    """
    z = linear_logits(hidden, weight, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    logprobs = selective_logprobs(z, targets, ignore_index=ignore_index)
    if not entropy:
        return logprobs
    log_p = torch.log_softmax(z, dim=-1)
    # An entry that the bias masks has log p = -inf and p = 0: it adds nothing, where 0 * -inf would be nan.
    p_log_p = log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)
    return logprobs, (-p_log_p.sum(-1)).masked_fill(_ignored(targets, ignore_index), 0.0)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each sequence's values.

        out[i] = sum(values[cu_seqlens[i] : cu_seqlens[i + 1]])

    Args:
        values: (T,) floating.
        cu_seqlens: (S + 1,) int64 offsets of the sequences, rising from 0 to T.

    Returns:
        (S,) in the dtype of `values`; 0 for an empty sequence.
    """
    bounds = cu_seqlens.tolist()
    sums = [values[start:end].sum() for start, end in pairwise(bounds)]
    return torch.stack(sums) if sums else values[:0]


def logits_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, divergence: Divergence = "forward_kl", temperature: float = 1.0,
    jsd_beta: float = 0.5,
) -> Tensor:  # fmt: skip
    """Divergence of the student's next-token distribution s from the teacher's t, per token.

        forward_kl: KL(t || s)
        reverse_kl: KL(s || t)
        jsd:        jsd_beta * KL(t || m) + (1 - jsd_beta) * KL(s || m)  with  m = jsd_beta * t + (1 - jsd_beta) * s

    Args:
        student_logits: (..., V) floating.
        teacher_logits: (..., V) floating.
        divergence: One of DIVERGENCES.
        temperature: What both logits are divided by.
        jsd_beta: The teacher's share in `jsd`.

    Returns:
        (...) float32 in nats, or float64 for float64 inputs.

    References:
        Agarwal et al. 2024, arXiv:2306.13649.
    """
    dtype = compute_dtype(student_logits, teacher_logits)
    s = torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    t = torch.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)
    return divergence_of_logprobs(s, t, divergence, jsd_beta)


def _expect(log_p: Tensor, difference: Tensor) -> Tensor:
    """`sum_j p_j difference_j`, where a masked entry (p = 0, difference nan or infinite) adds nothing."""
    return (log_p.exp() * difference.masked_fill(log_p.isneginf(), 0.0)).sum(-1)


def divergence_of_logprobs(s: Tensor, t: Tensor, divergence: Divergence, jsd_beta: float) -> Tensor:
    """`logits_divergence` from log-probabilities instead of logits.

    Args:
        s: (..., V) log-probabilities of the student, in nats.
        t: (..., V) log-probabilities of the teacher, in nats.
        divergence: One of DIVERGENCES.
        jsd_beta: The teacher's share in `jsd`.

    Returns:
        (...) in nats, in the dtype of `s`.

    Raises:
        ValueError: `divergence` is none of DIVERGENCES.
    """
    if divergence == "forward_kl":
        return _expect(t, t - s)
    if divergence == "reverse_kl":
        return _expect(s, s - t)
    if divergence != "jsd":
        raise ValueError(f"divergence is {divergence!r}; it must be one of {DIVERGENCES}")
    # Where both probabilities are 0, the gradient of log m would be infinity times 0, which is nan. The clamp stops it.
    m = (jsd_beta * t.exp() + (1 - jsd_beta) * s.exp()).clamp(min=torch.finfo(s.dtype).tiny).log()
    return jsd_beta * _expect(t, t - m) + (1 - jsd_beta) * _expect(s, s - m)


def linear_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *, bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, mask: Tensor | None = None, divergence: Divergence = "forward_kl",
    temperature: float = 1.0, jsd_beta: float = 0.5, logit_scale: float = 1.0, softcap: float | None = None,
    teacher_logit_scale: float = 1.0, teacher_softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """`logits_divergence` of the logits of two models, from their hidden states. The teacher gets no gradient.

    Where the vocabularies differ in length, both are cut to the shorter one.

    Args:
        hidden: (..., H) hidden states of the student.
        weight: (V, H) output layer of the student.
        teacher_hidden: (..., G) hidden states of the teacher at the same positions.
        teacher_weight: (U, G) output layer of the teacher.
        bias: (V,) bias of the student's output layer.
        teacher_bias: (U,) bias of the teacher's.
        mask: (...) bool; the result is 0 where it is False.
        divergence: As for `logits_divergence`.
        temperature: As for `logits_divergence`.
        jsd_beta: As for `logits_divergence`.
        logit_scale: As for `linear_logits`, of the student.
        softcap: As for `linear_logits`, of the student.
        teacher_logit_scale: As for `linear_logits`, of the teacher.
        teacher_softcap: As for `linear_logits`, of the teacher.

    Returns:
        (...) float32 in nats, or float64 for float64 inputs.
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
    """Fisher information of a linear layer's weight: the sum of squared per-sequence gradients.

        out = fisher + sum_s (G_s' X_s)^2

    G_s and X_s are the rows of `grad_output` and `inputs` that belong to sequence s, and G_s' X_s is the gradient of
    that sequence in the weight.

    Args:
        fisher: (out, in) floating, the sum so far.
        grad_output: (T, out) floating, the gradient of the loss in the layer's output.
        inputs: (T, in) floating, the layer's input.
        cu_seqlens: (S + 1,) int64 offsets of the sequences, rising from 0 to T.

    Returns:
        (out, in) float32, or float64 for float64 inputs.
    """
    dtype = compute_dtype(fisher, grad_output, inputs)
    out = fisher.to(dtype, copy=True)
    for start, end in pairwise(cu_seqlens.tolist()):
        out += (grad_output[start:end].to(dtype).T @ inputs[start:end].to(dtype)) ** 2
    return out


def ewc_penalty(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor] | None, strength: float = 1.0
) -> Tensor:
    """Penalty of elastic weight consolidation: squared distance to the anchors, weighted by Fisher information.

        strength / 2 * sum_i F_i (theta_i - theta0_i)^2

    Args:
        parameters: theta, tensors of any shapes.
        anchors: theta0, tensors of the same shapes: the parameters that the penalty pulls back to.
        fishers: F, tensors of the same shapes; None: F = 1, which is the L2 distance.
        strength: Factor of the penalty.

    Returns:
        A scalar, float32, or float64 for float64 inputs.
    """
    dtype = compute_dtype(*parameters, *anchors)
    weights = [1.0] * len(parameters) if fishers is None else [f.to(dtype) for f in fishers]
    terms = zip(parameters, anchors, weights, strict=True)
    sums = [(f * (p.to(dtype) - a.to(dtype)) ** 2).sum() for p, a, f in terms]
    return strength / 2 * sum(sums, start=torch.zeros((), dtype=dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation: `x * weight / sqrt(mean(x^2) + eps)`, the mean over the last dimension.

    Args:
        x: (..., H) floating.
        weight: (H,) floating.
        eps: What is added to the mean square, so that a row of zeros does not divide by 0.
    """
    x = x.to(compute_dtype(x, weight))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU between its matrix products: `silu(gate) * up` with `silu(g) = g / (1 + exp(-g))`.

    Args:
        gate: (..., I) floating, the output of the gate's projection.
        up: Shaped like `gate`, the output of the other projection.
    """
    gate = gate.to(compute_dtype(gate, up))
    return gate * torch.sigmoid(gate) * up


def seen_keys(segments: Tensor, window: int | None = None) -> Tensor:
    """Which keys each token of a packed row attends to.

    A token sees the prefix of its segment, and its segment up to itself. With a window it sees the last `window` of
    these.

    Args:
        segments: (S, 4) int64, for each segment its first token, its length, the first token of its prefix, and the
            prefix's length (0: no prefix).
        window: How many of the keys before it, itself included, a token sees; None: all.

    Returns:
        (T, T) bool, rows are queries and columns keys.
    """
    tokens = int(segments[:, 1].sum())
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, length, prefix_start, prefix in segments.tolist():
        key = torch.arange(prefix + length)
        query = key[prefix:, None]
        sees = (key <= query) & (key > query - (window or tokens))
        segment = slice(start, start + length)
        seen[segment, prefix_start : prefix_start + prefix] = sees[:, :prefix]
        seen[segment, segment] = sees[:, prefix:]
    return seen


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, window: int | None, scaling: float
) -> Tensor:
    """Attention in a packed row, each token over its `seen_keys`.

        out = softmax(scaling * query key') value

    Each key head serves heads / key_heads neighbouring query heads.

    Args:
        query: (1, heads, T, D) floating.
        key: (1, key_heads, T, D) floating.
        value: (1, key_heads, T, Dv) floating.
        segments: As for `seen_keys`.
        window: As for `seen_keys`.
        scaling: Factor of the products of queries and keys, as a rule 1 / sqrt(D).

    Returns:
        (1, T, heads, Dv) float32, or float64 for float64 inputs.
    """
    dtype, shared = compute_dtype(query, key, value), query.shape[1] // key.shape[1]
    k, v = (t.to(dtype).repeat_interleave(shared, 1) for t in (key, value))
    scores = scaling * query.to(dtype) @ k.transpose(-1, -2)
    probs = scores.masked_fill(~seen_keys(segments, window), -torch.inf).softmax(-1)
    return (probs @ v).transpose(1, 2)


def with_tail(logprobs: Tensor) -> Tensor:
    """Log-probabilities of some entries, followed by the log-probability of all others together, the tail.

        tail = log(1 - sum exp(logprobs))

    The tail's probability is at least 1e-7: the sum is rounded, and a tail of 0 would make a KL infinite.

    logprobs (..., k) -> (..., k + 1).
    """
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([logprobs, rest.log()], -1)


def sparse_divergence(
    hidden: Tensor, weight: Tensor, teacher_indices: Tensor, teacher_logprobs: Tensor, *, bias: Tensor | None = None,
    mask: Tensor | None = None, divergence: Divergence = "forward_kl", temperature: float = 1.0, jsd_beta: float = 0.5,
    logit_scale: float = 1.0, softcap: float | None = None, tail: Tail = "lump",
) -> Tensor:  # fmt: skip
    """Divergence from a teacher of whom only the top k log-probabilities are known, from hidden states.

    Args:
        hidden: (..., H) hidden states of the student.
        weight: (V, H) output layer of the student.
        teacher_indices: (..., k) int64, the entries of the vocabulary that the teacher scored.
        teacher_logprobs: (..., k) floating, the teacher's log-probabilities of them at `temperature`.
        bias: (V,) bias of the student's output layer.
        mask: (...) bool; the result is 0 where it is False.
        divergence: As for `logits_divergence`.
        temperature: What the student's logits are divided by.
        jsd_beta: As for `logits_divergence`.
        logit_scale: As for `linear_logits`.
        softcap: As for `linear_logits`.
        tail: "lump" compares all other entries as one more entry, "drop" leaves them out.

    Returns:
        (...) float32 in nats, or float64 for float64 inputs.
    """
    z = linear_logits(hidden, weight, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    out = sparse_logits_divergence(
        z, teacher_indices, teacher_logprobs, divergence=divergence, jsd_beta=jsd_beta, tail=tail
    )
    return out if mask is None else out.masked_fill(~mask, 0.0)


def sparse_logits_divergence(
    student_logits: Tensor, teacher_indices: Tensor, teacher_logprobs: Tensor, *, divergence: Divergence = "forward_kl",
    temperature: float = 1.0, jsd_beta: float = 0.5, tail: Tail = "lump",
) -> Tensor:  # fmt: skip
    """`sparse_divergence` from the student's logits instead of its hidden states.

    Args:
        student_logits: (..., V) floating.
        teacher_indices: As for `sparse_divergence`.
        teacher_logprobs: As for `sparse_divergence`.
        divergence: As for `sparse_divergence`.
        temperature: As for `sparse_divergence`.
        jsd_beta: As for `sparse_divergence`.
        tail: As for `sparse_divergence`.

    Returns:
        (...) float32 in nats, or float64 for float64 inputs.
    """
    z = student_logits.to(compute_dtype(student_logits)) / temperature
    log_p = torch.log_softmax(z, dim=-1)
    s, t = log_p.gather(-1, teacher_indices), teacher_logprobs.to(z.dtype)
    if tail == "lump" and t.shape[-1] < z.shape[-1]:
        others = log_p.scatter(-1, teacher_indices, -torch.inf).logsumexp(-1, keepdim=True)
        s, t = torch.cat([s, others], -1), with_tail(t)
    return divergence_of_logprobs(s, t, divergence, jsd_beta)
