"""Divergence of a student's next-token distributions from a teacher's, straight from both hidden states.

Schema, fake, autograd and the public function, top to bottom; the arithmetic is in `divergence_tiles.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastalign import reference
from fastalign.errors import BackendError
from fastalign.ops.backends import cpu, pick
from fastalign.ops.backends.pick import without_autocast
from fastalign.ops.head import divergence_tiles as tiles
from fastalign.ops.head.checks import check_devices, check_divergence_options, check_side, check_teacher_rows
from fastalign.ops.head.options import head_numbers
from fastalign.ops.head.rows import gather_rows, is_capturing, kept_rows, scatter_rows

_library = torch.library.Library("fastalign", "FRAGMENT")


_SIDES = (
    "Tensor hidden, Tensor weight, Tensor? bias, float[] head, "
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, float[] teacher_head"
)


_library.define(
    f"linear_divergence({_SIDES}, Tensor? mask, Tensor? coefficients, str divergence, float jsd_beta, bool grads, "
    "bool[2] needs, int memory_budget, *, str backend='torch') -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


_library.define(
    f"linear_divergence_backward(Tensor grad, {_SIDES}, Tensor? mask, Tensor? coefficients, Tensor stats, "
    "Tensor formed_weight, Tensor formed_bias, str divergence, float jsd_beta, bool[2] needs, *, str backend='torch') "
    "-> (Tensor, Tensor)"
)


class _Scored(NamedTuple):
    """The rows that count: unmasked, and of a weight other than 0."""

    rows: Tensor | None  # their numbers, None for all
    ignored: Tensor | None = None  # (N,) rows that stay, as zeros, although they do not count


def _scored(mask: Tensor | None, coefficients: Tensor | None) -> _Scored:
    if coefficients is not None:
        mask = coefficients != 0 if mask is None else mask & (coefficients != 0)
    if mask is not None and is_capturing(mask.device):
        return _Scored(None, ~mask)
    return _Scored(kept_rows(mask))


def _side(hidden, weight, bias, head, scored, vocab) -> tiles.Side:
    scale, softcap, temperature = head
    bias = None if bias is None else bias[:vocab]
    return tiles.Side(
        gather_rows(hidden, scored), weight[:vocab], bias, tiles.Head(scale, softcap or None, temperature)
    )


def _shared_vocab(weight: Tensor, teacher_weight: Tensor) -> int:
    return min(weight.shape[0], teacher_weight.shape[0])


def _fill_up(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of the entries that both vocabularies have, with zeros for the others, in the parameter's dtype."""
    missing = like.shape[0] - grad.shape[0]
    grad = grad.to(like.dtype)
    return grad if missing == 0 else torch.cat([grad, grad.new_zeros(missing, *grad.shape[1:])])


def _linear_divergence(
    hidden, weight, bias, head, teacher_hidden, teacher_weight, teacher_bias, teacher_head,
    mask, coefficients, divergence, jsd_beta, grads, needs, memory_budget, *, backend="torch",
):  # fmt: skip
    n, vocab, scored = hidden.shape[0], _shared_vocab(weight, teacher_weight), _scored(mask, coefficients)
    if backend == "cpu":
        formed = needs if coefficients is not None else (False, False)
        sides = (hidden, weight, bias, head), (teacher_hidden, teacher_weight, teacher_bias, teacher_head)
        *found, d_weight, d_bias = cpu.linear_divergence(
            *_to_length(vocab, *sides), scored.rows, divergence, jsd_beta, grads, memory_budget, coefficients, formed
        )
        return *found, *_whole(d_weight, d_bias, weight, bias, found[0])
    own = None if coefficients is None else gather_rows(coefficients, scored).to(reference.compute_dtype(hidden))
    out = tiles.forward(
        _side(hidden, weight, bias, head, scored, vocab),
        _side(teacher_hidden, teacher_weight, teacher_bias, teacher_head, scored, vocab),
        tiles.Divergence(divergence, jsd_beta),
        grads=grads,
        coefficients=own,
        needs=(needs[0] and own is not None, needs[1] and own is not None),
        budget=memory_budget,
        epilogue=pick.KERNELS[backend].divergence_epilogue() if backend in pick.KERNELS else None,
    )
    empty = out.values.new_empty(0)
    return (
        scatter_rows(out.values, scored, n),
        scatter_rows(out.grad_hidden, scored, n) if grads else empty,
        scatter_rows(out.stats, scored._replace(ignored=None), n),
        *_whole(out.d_weight, out.d_bias, weight, bias, empty),
    )


def _to_length(vocab: int, *sides):
    """Each side (hidden, weight, bias, head) with the vocabulary's first entries only."""
    return [(h, w[:vocab], None if bias is None else bias[:vocab], head) for h, w, bias, head in sides]


def _whole(d_weight, d_bias, weight, bias, values) -> tuple[Tensor, Tensor]:
    """Gradients of the whole weight and bias from those of the entries that count; empty where there is none."""
    return (
        weight.new_empty(0) if d_weight is None else _fill_up(d_weight, weight),
        values.new_empty(0) if d_bias is None else _fill_up(d_bias, bias),
    )


def _linear_divergence_fake(
    hidden, weight, bias, head, teacher_hidden, teacher_weight, teacher_bias, teacher_head,
    mask, coefficients, divergence, jsd_beta, grads, needs, memory_budget, *, backend="torch",
):  # fmt: skip
    n = hidden.shape[0]
    new = hidden.new_empty(0, dtype=reference.compute_dtype(hidden))
    formed_weight, formed_bias = (need and coefficients is not None for need in needs)
    return (
        new.new_empty(n),
        new.new_empty(hidden.shape if grads else 0),
        new.new_empty(n, 5),
        weight.new_empty(weight.shape if formed_weight else 0),
        bias.new_empty(bias.shape) if formed_bias else new.new_empty(0),
    )


def _linear_divergence_backward(
    grad, hidden, weight, bias, head, teacher_hidden, teacher_weight, teacher_bias, teacher_head,
    mask, coefficients, stats, formed_weight, formed_bias, divergence, jsd_beta, needs, *, backend="torch",
):  # fmt: skip
    """The weight's and bias's gradients: those formed with the coefficients, where `grad` is the same for all rows."""
    empty, scored = hidden.new_empty(0), _scored(mask, coefficients)
    kept = grad if scored.rows is None else grad[scored.rows]
    looks = coefficients is not None and not is_capturing(grad.device)
    if looks and (kept.numel() == 0 or bool((kept == kept[0]).all())):
        factor = kept[0] if kept.numel() else 0.0
        return formed_weight * factor if needs[0] else empty, formed_bias * factor if needs[1] else empty.clone()
    vocab, coefficients = _shared_vocab(weight, teacher_weight), grad if coefficients is None else grad * coefficients
    if backend == "cpu":
        sides = (hidden, weight, bias, head), (teacher_hidden, teacher_weight, teacher_bias, teacher_head)
        budget = tiles.default_budget(hidden.device)
        *_, d_weight, d_bias = cpu.linear_divergence(
            *_to_length(vocab, *sides), scored.rows, divergence, jsd_beta, False, budget, coefficients, needs
        )
        return _whole(d_weight, d_bias, weight, bias, empty)
    d_weight, d_bias = tiles.backward(
        gather_rows(coefficients, scored),
        _side(hidden, weight, bias, head, scored, vocab),
        _side(teacher_hidden, teacher_weight, teacher_bias, teacher_head, scored, vocab),
        tiles.Divergence(divergence, jsd_beta),
        _padded_stats(gather_rows(stats, scored._replace(ignored=None)), kept.shape[0]),
        needs=tuple(needs),
        epilogue=pick.KERNELS[backend].divergence_epilogue() if backend in pick.KERNELS else None,
    )
    return _whole(d_weight, d_bias, weight, bias, empty)


def _padded_stats(stats: Tensor, rows: int) -> Tensor:
    """Padding's normalisers are so large that its exponentials are 0: it must not overflow."""
    stats = stats.clone()
    stats[rows:] = -tiles.START
    return stats


def _linear_divergence_backward_fake(
    grad, hidden, weight, bias, head, teacher_hidden, teacher_weight, teacher_bias, teacher_head,
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
def _forward_flop(h, w, bias, head, teacher_h, teacher_w, teacher_bias, teacher_head, mask, coefficients, divergence,
                  jsd_beta, grads, needs, *args, **kwargs) -> int:  # fmt: skip
    formed = needs[0] and coefficients is not None
    return 2 * h[0] * min(w[0], teacher_w[0]) * ((1 + grads + formed) * w[1] + teacher_w[1])


@register_flop_formula(torch.ops.fastalign.linear_divergence_backward)
def _backward_flop(grad, h, w, bias, head, teacher_h, teacher_w, teacher_bias, teacher_head, mask, coefficients, stats,
                   formed_weight, formed_bias, divergence, jsd_beta, needs, *args, **kwargs) -> int:  # fmt: skip
    if coefficients is not None:  # formed in forward
        return 0
    return 2 * h[0] * min(w[0], teacher_w[0]) * ((1 + needs[0]) * w[1] + teacher_w[1])


class _Options(NamedTuple):
    """The op's arguments beside the tensors."""

    head: tuple[float, float, float]
    teacher_head: tuple[float, float, float]
    divergence: str
    jsd_beta: float
    grads: bool
    needs: tuple[bool, bool]
    memory_budget: int
    backend: str


class _LinearDivergence(torch.autograd.Function):
    """Forward keeps d divergence / d hidden (N, H); a trainable head's gradient is formed there, or in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, coefficients, options):
        o: _Options = options
        values, grad_hidden, stats, formed_weight, formed_bias = torch.ops.fastalign.linear_divergence(
            hidden, weight, bias, o.head, teacher_hidden, teacher_weight, teacher_bias, o.teacher_head,
            mask, coefficients, o.divergence, o.jsd_beta, o.grads, o.needs, o.memory_budget, backend=o.backend,
        )  # fmt: skip
        ctx.options, ctx.hidden_dtype, ctx.trainable = options, hidden.dtype, any(o.needs)
        again = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, stats)
        formed = (formed_weight, formed_bias)
        ctx.save_for_backward(coefficients, grad_hidden, *(again + formed if ctx.trainable else ()))
        return values if coefficients is None else values * coefficients

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        o: _Options = ctx.options
        coefficients, grad_hidden, *rest = ctx.saved_tensors
        d_hidden = d_weight = d_bias = None
        if o.grads:
            scale = grad if coefficients is None else grad * coefficients
            d_hidden = (grad_hidden * scale.unsqueeze(1)).to(ctx.hidden_dtype)
        if ctx.trainable:
            hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, stats, *formed = rest
            d_weight, d_bias = torch.ops.fastalign.linear_divergence_backward(
                grad, hidden, weight, bias, o.head, teacher_hidden, teacher_weight, teacher_bias, o.teacher_head,
                mask, coefficients, stats, *formed, o.divergence, o.jsd_beta, o.needs, backend=o.backend,
            )  # fmt: skip
        return d_hidden, d_weight if o.needs[0] else None, d_bias if o.needs[1] else None, *[None] * 6


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
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence of the student's next-token distribution s from the teacher's t, per token, from hidden states.

    s and t are the softmax of `softcap * tanh(logit_scale * (h W' + b) / softcap) / temperature` (no cap:
    `logit_scale * (h W' + b) / temperature`), each with its own scale and cap. With m = jsd_beta t + (1 - jsd_beta) s:
    "forward_kl" `KL(t || s)`, "reverse_kl" `KL(s || t)`, "jsd" `jsd_beta KL(t || m) + (1 - jsd_beta) KL(s || m)`
    (Agarwal et al. 2024, arXiv:2306.13649); in nats, not multiplied by temperature^2. Differentiable (once) in the
    student's hidden, weight and bias; the teacher is a constant.

    hidden: (..., H) floating. weight: (V, H). bias: (V,). teacher_hidden: (..., G), the same tokens; G may differ from
        H. teacher_weight: (U, G). teacher_bias: (U,). Where V and U differ (padding), only the first min(V, U) entries
        count, on both sides: the rest is in neither softmax, and has gradient 0.
    mask: (...) bool. Rows where it is False are dropped before any product, return 0 and get zero gradient.
    token_weights: (...) constants that multiply the divergences; rows of weight 0 are dropped too. Where the result is
        then summed, the coefficients of the gradient are known in advance, and a trainable head's is formed in the
        forward pass. Any other use of the result is right as well, and forms it again.
    memory_budget: bytes of logits held at a time (default: 128 MiB on the CPU, 1 GiB elsewhere), of 16 rows at least.
    backend: "torch" (the tiled driver), "triton" or "cuda" (the same with kernels of our own between its products, on a
        GPU), "cpu" (C++, for one dtype on both sides), "reference" (materialises the logits),
        or "auto" (picks by device: "cuda" or "triton" on a GPU, "cpu" on the CPU where it can and is faster, else
        "torch").

    Returns (...) float32, or float64 for float64 inputs; infinity for a KL whose second distribution rules out what the
    first allows (bias -inf). Cost, with U = 2 N V H of the student and T of the teacher: U + T without gradients,
    2U + T forward and backward with a frozen student head, whichever the divergence; 3U + T with a trainable one and
    token_weights, 4U + 2T without. Extra memory is O(rows x H) + the budget, whatever V is. InputError names a wrong
    shape, dtype, device or option; BackendError an unknown backend. While a CUDA graph is captured nothing is dropped,
    ignored rows are computed as zeros, and a trainable head's gradient is formed in the backward pass.
    """
    check_divergence_options(divergence, temperature, jsd_beta, memory_budget, backend)
    check_side("", hidden, weight, bias, softcap)
    check_side("teacher_", teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)
    check_teacher_rows(hidden, teacher_hidden=teacher_hidden, mask=mask, token_weights=token_weights)
    check_devices(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, token_weights)
    if backend == "reference":
        values = reference.linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, bias=bias, teacher_bias=teacher_bias, mask=mask,
            divergence=divergence, temperature=temperature, jsd_beta=jsd_beta, logit_scale=logit_scale,
            softcap=softcap, teacher_logit_scale=teacher_logit_scale, teacher_softcap=teacher_softcap,
        )  # fmt: skip
        return values if token_weights is None else values * token_weights.to(values.dtype)
    hidden, weight, teacher_hidden, teacher_weight = _common_dtypes(hidden, weight, teacher_hidden, teacher_weight)
    acc = reference.compute_dtype(hidden)
    shape, needs_grad = hidden.shape[:-1], torch.is_grad_enabled()
    backend = _resolve(backend, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    options = _Options(
        head_numbers(logit_scale, softcap, temperature),
        head_numbers(teacher_logit_scale, teacher_softcap, temperature),
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
        None if token_weights is None else token_weights.detach().reshape(-1).to(acc),
        options,
    )
    return values.view(shape)


def _resolve(backend: str, hidden: Tensor, *others: Tensor | None) -> str:
    """What "auto" stands for here; BackendError where "cpu" was asked for by name and cannot run."""
    if backend == "torch":
        return backend
    if backend == "auto" and (on_gpu := pick.pick(hidden, *others)):
        return on_gpu
    if backend in pick.KERNELS:
        if why := pick.KERNELS[backend].why_not(hidden, *others):
            raise BackendError(f"backend={backend!r} cannot run linear_divergence here: {why}")
        return backend
    why = cpu.why_not(hidden, *others) or cpu.why_no_kernel("divergence")
    teacher_dtypes = {t.dtype for t in (others[0], others[2], others[3])}
    if why is None and teacher_dtypes != {hidden.dtype}:
        why = f"student and teacher are {hidden.dtype} and {others[2].dtype}; it takes one dtype"
    if backend == "cpu":
        if why:
            raise BackendError(f"backend='cpu' cannot run linear_divergence here: {cpu.refused or why}")
        return "cpu"
    if cpu.refused and hidden.device.type == "cpu":
        raise BackendError(f"backend='auto' cannot run linear_divergence here: {cpu.refused}")
    return "cpu" if why is None and cpu.is_fast(hidden.dtype) else "torch"


def _common_dtypes(hidden, weight, teacher_hidden, teacher_weight) -> list[Tensor]:
    """Each side in one dtype of its own; all in float64 if any is."""
    tensors = [hidden, weight, teacher_hidden, teacher_weight]
    if reference.compute_dtype(*tensors) == torch.float64:
        return [t.double() for t in tensors]
    student, teacher = (torch.promote_types(h.dtype, w.dtype) for h, w in ((hidden, weight), tensors[2:]))
    return [hidden.to(student), weight.to(student), teacher_hidden.to(teacher), teacher_weight.to(teacher)]
