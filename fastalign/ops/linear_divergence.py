"""Divergence of a student's next-token distributions from a teacher's, straight from both models' hidden states.

Top to bottom: schema, kernels, fakes, FLOP formulas, autograd, and the public function. The arithmetic is in
`head/divergence_terms.py`, the tiled driver in `head/divergence_tiles.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastalign import reference
from fastalign.ops.backends import cpu_head, pick
from fastalign.ops.backends.launch import without_autocast
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head import divergence_tiles as tiles
from fastalign.ops.head.checks import (
    check_devices,
    check_divergence,
    check_linear,
    check_memory_budget,
    check_per_token,
    check_same_tokens,
)
from fastalign.ops.head.divergence_terms import DivergenceKind, without_distribution
from fastalign.ops.head.rows import (
    ScoredRows,
    counting_mask,
    find_unmasked_rows,
    gather_rows,
    is_capturing,
    scatter_rows,
)
from fastalign.ops.head.tiling import START
from fastalign.ops.head.transform import pack_transform, unpack_transform
from fastalign.reference import Divergence

_library = torch.library.Library("fastalign", "FRAGMENT")
_SIDES = (
    "Tensor hidden, Tensor weight, Tensor? bias, float[] transform, "
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, float[] teacher_transform"
)
# Returns values (N,), d value / d hidden (N, H), stats (N, 5), and the gradients of sum(coefficients * values) in
# weight (V, H) and bias (V,). A result that is not needed is an empty tensor.
_library.define(
    f"linear_divergence({_SIDES}, Tensor? mask, Tensor? coefficients, str divergence, float jsd_beta, bool grads, "
    "bool[2] needs, int memory_budget, *, str backend='torch') -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_divergence_backward(Tensor grad, {_SIDES}, Tensor? mask, Tensor? coefficients, Tensor stats, "
    "Tensor formed_weight, Tensor formed_bias, str divergence, float jsd_beta, bool[2] needs, *, str backend='torch') "
    "-> (Tensor, Tensor)"
)


def _side(hidden, weight, bias, transform, scored: ScoredRows, vocab: int) -> tiles.Side:
    bias = None if bias is None else bias[:vocab]
    return tiles.Side(gather_rows(hidden, scored), weight[:vocab], bias, unpack_transform(transform))


def _cut_vocabulary(vocab: int, hidden, weight, bias, transform) -> cpu_head.SideArguments:
    """A side with the first entries of the vocabulary only."""
    return hidden, weight[:vocab], None if bias is None else bias[:vocab], transform


def _full_vocab_gradients(d_weight, d_bias, weight, bias, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the whole weight and bias from those of the shared entries; empty where there is none."""
    return (
        weight.new_empty(0) if d_weight is None else _append_zeros(d_weight, weight),
        like.new_empty(0) if d_bias is None else _append_zeros(d_bias, bias),
    )


def _append_zeros(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's dtype, with zeros for the entries that the other vocabulary does not have."""
    missing = parameter.shape[0] - grad.shape[0]
    grad = grad.to(parameter.dtype)
    return grad if missing == 0 else torch.cat([grad, grad.new_zeros(missing, *grad.shape[1:])])


def _epilogue(backend: str) -> tiles.DivergenceEpilogue | None:
    return pick.GPU_KERNELS[backend].divergence_epilogue() if backend in pick.GPU_KERNELS else None


def _linear_divergence(
    hidden, weight, bias, transform, teacher_hidden, teacher_weight, teacher_bias, teacher_transform,
    mask, coefficients, divergence, jsd_beta, grads, needs, memory_budget, *, backend="torch",
):  # fmt: skip
    n, vocab = hidden.shape[0], min(weight.shape[0], teacher_weight.shape[0])
    scored = find_unmasked_rows(counting_mask(mask, coefficients))
    formed = (needs[0] and coefficients is not None, needs[1] and coefficients is not None)
    if backend == "cpu":
        values, grad_hidden, stats, d_weight, d_bias = cpu_head.linear_divergence(
            _cut_vocabulary(vocab, hidden, weight, bias, transform),
            _cut_vocabulary(vocab, teacher_hidden, teacher_weight, teacher_bias, teacher_transform),
            scored.rows, divergence, jsd_beta, grads=grads, budget=memory_budget, coefficients=coefficients,
            needs=formed,
        )  # fmt: skip
        _mark_without_distribution(values, grad_hidden, stats, transform, teacher_transform)
        return values, grad_hidden, stats, *_full_vocab_gradients(d_weight, d_bias, weight, bias, values)
    if coefficients is not None:
        coefficients = gather_rows(coefficients, scored).to(reference.compute_dtype(hidden))
    out = tiles.forward(
        _side(hidden, weight, bias, transform, scored, vocab),
        _side(teacher_hidden, teacher_weight, teacher_bias, teacher_transform, scored, vocab),
        DivergenceKind(divergence, jsd_beta),
        grads=grads,
        coefficients=coefficients,
        needs=formed,
        budget=memory_budget,
        epilogue=_epilogue(backend),
    )
    empty = out.values.new_empty(0)
    _mark_without_distribution(out.values, empty if out.grad_hidden is None else out.grad_hidden, out.stats, transform,
                         teacher_transform)  # fmt: skip
    return (
        scatter_rows(out.values, scored, n),
        empty if out.grad_hidden is None else scatter_rows(out.grad_hidden, scored, n),
        scatter_rows(out.stats, scored._replace(ignored=None), n),
        *_full_vocab_gradients(out.d_weight, out.d_bias, weight, bias, empty),
    )


def _mark_without_distribution(
    values: Tensor, grad_hidden: Tensor, stats: Tensor, transform, teacher_transform
) -> None:
    """Writes NaN where a side's logits are all -inf, in place. The kernels hold -inf as a finite number.

    The log-normalisers become NaN too, so that gradients of the output layer do.

    Args:
        values: (N,).
        grad_hidden: (N, H), or empty.
        stats: (N, 5), with the largest logit of the student in column 0 and of the teacher in column 2.
        transform: Of the student's logits, packed.
        teacher_transform: Of the teacher's.
    """
    nothing = without_distribution(stats[:, 0], unpack_transform(transform))
    nothing |= without_distribution(stats[:, 2], unpack_transform(teacher_transform))
    values.masked_fill_(nothing, math.nan)
    stats[:, 1::2].masked_fill_(nothing.unsqueeze(1), math.nan)
    if grad_hidden.numel():
        grad_hidden.masked_fill_(nothing.unsqueeze(1), math.nan)


def _linear_divergence_fake(
    hidden, weight, bias, transform, teacher_hidden, teacher_weight, teacher_bias, teacher_transform,
    mask, coefficients, divergence, jsd_beta, grads, needs, memory_budget, *, backend="torch",
):  # fmt: skip
    n, new = hidden.shape[0], hidden.new_empty(0, dtype=reference.compute_dtype(hidden))
    formed_weight, formed_bias = (need and coefficients is not None for need in needs)
    return (
        new.new_empty(n),
        new.new_empty(hidden.shape if grads else 0),
        new.new_empty(n, 5),
        weight.new_empty(weight.shape if formed_weight else 0),
        bias.new_empty(bias.shape) if formed_bias else new.new_empty(0),
    )


def _linear_divergence_backward(
    grad, hidden, weight, bias, transform, teacher_hidden, teacher_weight, teacher_bias, teacher_transform,
    mask, coefficients, stats, formed_weight, formed_bias, divergence, jsd_beta, needs, *, backend="torch",
):  # fmt: skip
    """The gradients in weight and bias.

    `forward` formed them with the coefficients, under the assumption that the values are then summed. That is right up
    to a factor where `grad` is the same for all rows. For any other `grad` they are recomputed.
    """
    empty, scored = hidden.new_empty(0), find_unmasked_rows(counting_mask(mask, coefficients))
    kept = grad if scored.rows is None else grad[scored.rows]
    # The usual loss is the sum of the values, or their sum times a number: then all entries of `grad` are equal.
    may_look = not is_capturing(grad.device)  # at values, which waits for a GPU
    if coefficients is not None and may_look and (kept.numel() == 0 or bool((kept == kept[0]).all())):
        factor = kept[0] if kept.numel() else 0.0
        return formed_weight * factor if needs[0] else empty, formed_bias * factor if needs[1] else empty.clone()
    vocab = min(weight.shape[0], teacher_weight.shape[0])
    coefficients = grad if coefficients is None else grad * coefficients
    if backend == "cpu":
        *_, d_weight, d_bias = cpu_head.linear_divergence(
            _cut_vocabulary(vocab, hidden, weight, bias, transform),
            _cut_vocabulary(vocab, teacher_hidden, teacher_weight, teacher_bias, teacher_transform),
            scored.rows, divergence, jsd_beta, grads=False, budget=tiles.default_budget(hidden.device),
            coefficients=coefficients, needs=needs,
        )  # fmt: skip
        return _full_vocab_gradients(d_weight, d_bias, weight, bias, empty)
    d_weight, d_bias = tiles.backward(
        gather_rows(coefficients, scored),
        _side(hidden, weight, bias, transform, scored, vocab),
        _side(teacher_hidden, teacher_weight, teacher_bias, teacher_transform, scored, vocab),
        DivergenceKind(divergence, jsd_beta),
        _padded_stats(gather_rows(stats, scored._replace(ignored=None)), kept.shape[0]),
        needs=needs,
        epilogue=_epilogue(backend),
    )
    return _full_vocab_gradients(d_weight, d_bias, weight, bias, empty)


def _padded_stats(stats: Tensor, rows: int) -> Tensor:
    """Give padding rows a huge log-normaliser, so that exp(logit - it) is 0 and cannot overflow."""
    stats = stats.clone()
    stats[rows:] = -START
    return stats


def _linear_divergence_backward_fake(
    grad, hidden, weight, bias, transform, teacher_hidden, teacher_weight, teacher_bias, teacher_transform,
    mask, coefficients, stats, formed_weight, formed_bias, divergence, jsd_beta, needs, *, backend="torch",
):  # fmt: skip
    return (
        weight.new_empty(weight.shape) if needs[0] else hidden.new_empty(0),
        bias.new_empty(bias.shape) if needs[1] else hidden.new_empty(0),
    )


_library.impl("linear_divergence", without_autocast(_linear_divergence), "CompositeExplicitAutograd")
_library.impl("linear_divergence_backward", without_autocast(_linear_divergence_backward), "CompositeExplicitAutograd")
torch.library.register_fake("fastalign::linear_divergence", _linear_divergence_fake, lib=_library)
torch.library.register_fake("fastalign::linear_divergence_backward", _linear_divergence_backward_fake, lib=_library)


@register_flop_formula(torch.ops.fastalign.linear_divergence)
def _forward_flop(
    h, w, bias, transform, teacher_h, teacher_w, teacher_bias, teacher_transform, mask, coefficients, divergence,
    jsd_beta, grads, needs, *args, **kwargs,
) -> int:  # fmt: skip
    formed = needs[0] and coefficients is not None
    return 2 * h[0] * min(w[0], teacher_w[0]) * ((1 + grads + formed) * w[1] + teacher_w[1])


@register_flop_formula(torch.ops.fastalign.linear_divergence_backward)
def _backward_flop(
    grad, h, w, bias, transform, teacher_h, teacher_w, teacher_bias, teacher_transform, mask, coefficients, stats,
    formed_weight, formed_bias, divergence, jsd_beta, needs, *args, **kwargs,
) -> int:  # fmt: skip
    if coefficients is not None:  # formed in forward
        return 0
    return 2 * h[0] * min(w[0], teacher_w[0]) * ((1 + needs[0]) * w[1] + teacher_w[1])


class _DivergenceCall(NamedTuple):
    """The arguments of one call that are not tensors."""

    transform: tuple[float, float, float]
    teacher_transform: tuple[float, float, float]
    divergence: Divergence
    jsd_beta: float
    grads: bool  # whether hidden needs a gradient
    needs: tuple[bool, bool]  # whether weight and bias do
    memory_budget: int
    backend: Backend


class _LinearDivergence(torch.autograd.Function):
    """Saves d divergence / d hidden (N, H). A trainable output layer's gradients are formed in forward or backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, coefficients, call):
        values, grad_hidden, stats, formed_weight, formed_bias = torch.ops.fastalign.linear_divergence(
            hidden, weight, bias, call.transform, teacher_hidden, teacher_weight, teacher_bias, call.teacher_transform,
            mask, coefficients, call.divergence, call.jsd_beta, call.grads, call.needs, call.memory_budget,
            backend=call.backend,
        )  # fmt: skip
        ctx.call, ctx.hidden_dtype, ctx.trainable = call, hidden.dtype, any(call.needs)
        again = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, stats)
        formed = (formed_weight, formed_bias)
        ctx.save_for_backward(coefficients, grad_hidden, *(again + formed if ctx.trainable else ()))
        return values if coefficients is None else values * coefficients

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        call: _DivergenceCall = ctx.call
        coefficients, grad_hidden, *rest = ctx.saved_tensors
        d_hidden = d_weight = d_bias = None
        if call.grads:
            scale = grad if coefficients is None else grad * coefficients
            d_hidden = (grad_hidden * scale.unsqueeze(1)).to(ctx.hidden_dtype)
        if ctx.trainable:
            hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, stats, *formed = rest
            d_weight, d_bias = torch.ops.fastalign.linear_divergence_backward(
                grad, hidden, weight, bias, call.transform, teacher_hidden, teacher_weight, teacher_bias,
                call.teacher_transform, mask, coefficients, stats, *formed, call.divergence, call.jsd_beta, call.needs,
                backend=call.backend,
            )  # fmt: skip
        return d_hidden, d_weight if call.needs[0] else None, d_bias if call.needs[1] else None, *[None] * 6


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution s from the teacher's t, per token, from hidden states.

    s and t are the softmax of `softcap * tanh(logit_scale * (h W' + b) / softcap) / temperature` (without a soft cap:
    `logit_scale * (h W' + b) / temperature`), each with its own scale and cap. With m = jsd_beta t + (1 - jsd_beta) s:

    - "forward_kl": `KL(t || s)`
    - "reverse_kl": `KL(s || t)`
    - "jsd": `jsd_beta KL(t || m) + (1 - jsd_beta) KL(s || m)`

    in nats, not multiplied by temperature^2. The result is differentiable (once) in the student's hidden, weight and
    bias; the teacher is a constant.

    Cost, with U = 2 N V H FLOP of the student and T of the teacher, the same for all three divergences: U + T without
    gradients, 2U + T forward and backward with a frozen student output layer, 3U + T with a trainable one and
    token_weights, 4U + 2T with a trainable one and none. Extra memory is O(rows x H) plus the budget, whatever V is.

    Args:
        hidden: (..., H) floating, the student's.
        weight: (V, H) floating.
        teacher_hidden: (..., G) floating, of the same tokens; G may differ from H.
        teacher_weight: (U, G) floating. Where V and U differ (padding), only the first min(V, U) entries count, on both
            sides: the rest is in neither softmax, and has gradient 0.
        bias: (V,) floating.
        teacher_bias: (U,) floating.
        mask: (...) bool. Rows where it is False are dropped before any product, return 0 and get zero gradient.
        token_weights: (...) floating constants that multiply the divergences. Rows of weight 0 are dropped too. Where
            the result is then summed, the coefficients of the gradient are known in advance, and a trainable output
            layer's gradient is formed in the forward pass. Any other use of the result is right as well, and forms it
            again.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        temperature: Divides the logits of both sides; above 0.
        jsd_beta: The teacher's share in m, between 0 and 1.
        logit_scale: Multiplies the student's products.
        softcap: The student's soft cap, or None.
        teacher_logit_scale: Multiplies the teacher's products.
        teacher_softcap: The teacher's soft cap, or None.
        memory_budget: Bytes of logits held at a time (default: 128 MiB on the CPU, 1 GiB elsewhere), but always those
            of 16 rows at least.
        backend: One of
            "torch": the tiled driver, on any device and dtype;
            "triton", "cuda": the same on a GPU, with fastalign's kernels between the products;
            "cpu": C++, where all weights and hidden states have one dtype;
            "reference": materialises the logits;
            "auto": on a GPU "cuda" or "triton", where either runs; on the CPU "cpu" where it is faster; else "torch".

    Returns:
        (...) float32, or float64 for float64 inputs. It is infinite for a KL whose second distribution rules out (bias
        -inf) what the first one allows.

    Raises:
        InputError: A shape, dtype, device or option does not fit.
        BackendError: There is no such backend, or the backend that was named cannot run.

    While a CUDA graph is captured nothing can be dropped: ignored rows are computed, as zeros, and a trainable output
    layer's gradient is formed in the backward pass.

    References:
        Agarwal et al. 2024, On-policy distillation of language models (generalised jsd), arXiv:2306.13649.
    """
    check_divergence(divergence, temperature, jsd_beta)
    check_memory_budget(memory_budget)
    check_linear(hidden, weight, bias, softcap, logit_scale)
    check_linear(
        teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale, of="teacher_"
    )  # fmt: skip
    check_same_tokens(hidden, teacher_hidden)
    check_per_token(mask, token_weights, hidden.shape[:-1])
    check_devices(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, token_weights)
    given = hidden, weight, teacher_hidden, teacher_weight
    hidden, weight, teacher_hidden, teacher_weight = _common_dtypes(*given)

    def why_not(name: str) -> str | None:
        if name != "cpu" or hidden.dtype == teacher_hidden.dtype:
            return None
        return f"student and teacher are {hidden.dtype} and {teacher_hidden.dtype}; it takes one dtype"

    backend = pick.resolve(
        "linear_divergence", backend, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias,
        cpu_kernel="divergence", why_not=why_not,
    )  # fmt: skip
    if backend == "reference":
        values = reference.linear_divergence(
            *given, bias=bias, teacher_bias=teacher_bias, mask=mask,
            divergence=divergence, temperature=temperature, jsd_beta=jsd_beta, logit_scale=logit_scale,
            softcap=softcap, teacher_logit_scale=teacher_logit_scale, teacher_softcap=teacher_softcap,
        )  # fmt: skip
        return values if token_weights is None else values * token_weights.to(values.dtype)
    shape, needs_grad = hidden.shape[:-1], torch.is_grad_enabled()
    call = _DivergenceCall(
        pack_transform(logit_scale, softcap, temperature),
        pack_transform(teacher_logit_scale, teacher_softcap, temperature),
        divergence,
        float(jsd_beta),
        needs_grad and hidden.requires_grad,
        (needs_grad and weight.requires_grad, needs_grad and bias is not None and bias.requires_grad),
        tiles.default_budget(hidden.device) if memory_budget is None else memory_budget,
        backend,
    )
    values = _LinearDivergence.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        None if mask is None else mask.reshape(-1),
        None if token_weights is None else token_weights.detach().reshape(-1).to(reference.compute_dtype(hidden)),
        call,
    )
    return values.view(shape)


def _common_dtypes(hidden, weight, teacher_hidden, teacher_weight) -> list[Tensor]:
    """Each side in the wider of its two dtypes; all four in float64 if any of them is."""
    tensors = [hidden, weight, teacher_hidden, teacher_weight]
    if reference.compute_dtype(*tensors) == torch.float64:
        return [t.double() for t in tensors]
    student, teacher = (torch.promote_types(h.dtype, w.dtype) for h, w in ((hidden, weight), tensors[2:]))
    return [hidden.to(student), weight.to(student), teacher_hidden.to(teacher), teacher_weight.to(teacher)]
