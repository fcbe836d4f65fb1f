"""Token log-probabilities straight from hidden states, without the `[tokens, vocabulary]` logits.

Top to bottom: schema, kernels, fakes (implementations that return shapes only, for `torch.compile`), FLOP formulas,
autograd, and the public function. The arithmetic is in `head/logprobs_tiles.py` and `head/epilogue.py`, in C++ in
csrc/cpu, and for GPUs in kernels/ and csrc/cuda.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastalign import reference
from fastalign.ops.backends import cpu_head, pick
from fastalign.ops.backends.launch import without_autocast
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head import anchored, logprobs_tiles
from fastalign.ops.head.checks import (
    check_devices,
    check_ignore_index,
    check_linear,
    check_memory_budget,
    check_target_ids,
    check_targets,
    check_temperature,
)
from fastalign.ops.head.chunked_logprobs import chunked_logprobs
from fastalign.ops.head.epilogue import TORCH, Epilogue, Stats
from fastalign.ops.head.rows import find_rows_with_target, gather_rows, scatter_rows
from fastalign.ops.head.tiling import pad_rows
from fastalign.ops.head.transform import LogitTransform
from fastalign.ops.head.weights import ComposedWeight, Lora, NewRows, PackedWeight, check_composed

BACKENDS: tuple[Backend, ...] = (*pick.BACKENDS, "anchored")
# Bytes of probability tiles that are cached for a trainable output layer when the caller names no budget.
DEFAULT_MEMORY_BUDGET = 1 << 30

_library = torch.library.Library("fastalign", "DEF")
# N is the number of rows (tokens), ignored ones included. Returns logprobs (N,), entropy (N,), d logprob / d hidden
# (N, H), d entropy / d hidden (N, H), stats (N, 5), cached tiles (C, V) and their shifts (C, tiles). A result that the
# arguments do not request is an empty tensor.
_library.define(
    "linear_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float logit_scale, float? softcap, "
    "float temperature, int? ignore_index, bool grads, bool entropy, int cache_rows, *, str backend='torch') "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_logprobs_backward(Tensor grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, "
    "Tensor targets, Tensor? bias, Tensor stats, Tensor cache, Tensor shifts, float logit_scale, float? softcap, "
    "float temperature, int? ignore_index, bool[3] needs, *, str backend='torch') -> (Tensor, Tensor, Tensor)"
)


def _epilogue(backend: str) -> Epilogue:
    return pick.GPU_KERNELS[backend].epilogue() if backend in pick.GPU_KERNELS else TORCH


def _linear_logprobs(
    hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index, grads, entropy, cache_rows,
    *, backend="torch",
):  # fmt: skip
    n, transform = targets.shape[0], LogitTransform(logit_scale, softcap, temperature)
    scored, scored_targets = find_rows_with_target(targets, ignore_index, weight.shape[0])
    if backend == "cpu":
        return cpu_head.linear_logprobs(
            hidden, weight, targets, scored.rows, bias, transform, grads=grads, entropy=entropy, cache_rows=cache_rows
        )
    if backend == "anchored":
        return anchored.linear_logprobs(
            hidden, weight, scored, scored_targets, bias, transform, grads=grads, entropy=entropy, cache_rows=cache_rows
        )
    out = logprobs_tiles.forward(
        gather_rows(hidden, scored),
        weight,
        pad_rows(scored_targets),
        None if bias is None else bias.contiguous(),
        transform,
        grads=grads,
        entropy=entropy,
        cache_rows=cache_rows,
        epilogue=_epilogue(backend),
    )
    empty = out.logprobs.new_empty(0)  # cloned below, because an op must not return one tensor twice
    cache, shifts = out.cache or (hidden.new_empty(0), empty.clone())
    return (
        scatter_rows(out.logprobs, scored, n),
        scatter_rows(out.entropy, scored, n) if entropy else empty,
        empty.clone() if out.grad_logprobs is None else scatter_rows(out.grad_logprobs, scored, n),
        empty.clone() if out.grad_entropy is None else scatter_rows(out.grad_entropy, scored, n),
        scatter_rows(torch.stack(out.stats, 1), scored, n),
        cache,
        shifts,
    )


def _linear_logprobs_fake(
    hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index, grads, entropy, cache_rows,
    *, backend="torch",
):  # fmt: skip
    n, width = hidden.shape
    new = torch.empty_like(targets, dtype=reference.compute_dtype(hidden, weight))
    vocab = weight.shape[0]
    columns, shifts = vocab, logprobs_tiles.cache_shifts(vocab, hidden.device)
    if backend in ("cpu", "anchored"):
        columns, shifts = (vocab, cpu_head.cache_shifts(vocab)) if backend == "cpu" else anchored.cache_shape(vocab)
    return (
        new.new_empty(n),
        new.new_empty(n if entropy else 0),
        new.new_empty((n, width) if grads else 0),
        new.new_empty((n, width) if grads and entropy else 0),
        new.new_empty(n, len(Stats._fields)),
        hidden.new_empty((cache_rows, columns) if cache_rows else 0),
        new.new_empty((cache_rows, shifts) if cache_rows and shifts else 0),
    )


def _linear_logprobs_backward(
    grad_logprobs, grad_entropy, hidden, weight, targets, bias, stats, cache, shifts,
    logit_scale, softcap, temperature, ignore_index, needs, *, backend="torch",
):  # fmt: skip
    n, transform = targets.shape[0], LogitTransform(logit_scale, softcap, temperature)
    scored, scored_targets = find_rows_with_target(targets, ignore_index, weight.shape[0])
    empty = hidden.new_empty(0)
    if backend == "cpu":
        grads = cpu_head.linear_logprobs_backward(
            grad_logprobs, grad_entropy, hidden, weight, targets, scored.rows, bias, stats, cache, shifts, transform,
            needs,
        )  # fmt: skip
        return tuple(empty.clone() if g is None else g for g in grads)
    if backend == "anchored":
        return anchored.linear_logprobs_backward(
            grad_logprobs, grad_entropy, hidden, weight, scored, scored_targets, bias, transform, stats, cache, needs
        )
    row_stats = Stats(*gather_rows(stats, scored).t().contiguous().unbind(0))
    # Padding rows have stats of 0, which would give 0/0 and 0*inf. So they get harmless values here.
    padding = (row_stats.others + row_stats.target) == 0
    row_stats = row_stats._replace(
        others=row_stats.others.masked_fill(padding, 1.0), shift=row_stats.shift.masked_fill(padding, math.inf)
    )
    d_hidden, d_weight, d_bias = logprobs_tiles.backward(
        gather_rows(grad_logprobs, scored),
        None if grad_entropy is None else gather_rows(grad_entropy, scored),
        gather_rows(hidden, scored),
        weight,
        pad_rows(scored_targets),
        None if bias is None else bias.contiguous(),
        transform,
        row_stats,
        logprobs_tiles.Cache(cache, shifts) if cache.numel() else None,
        needs=needs,
        epilogue=_epilogue(backend),
    )
    return (
        empty if d_hidden is None else scatter_rows(d_hidden, scored, n).to(hidden.dtype),
        empty.clone() if d_weight is None else d_weight,
        empty.clone() if d_bias is None else d_bias,
    )


def _linear_logprobs_backward_fake(
    grad_logprobs, grad_entropy, hidden, weight, targets, bias, stats, cache, shifts,
    logit_scale, softcap, temperature, ignore_index, needs, *, backend="torch",
):  # fmt: skip
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0),
        torch.empty_like(weight) if needs[1] else hidden.new_empty(0),
        torch.empty_like(bias) if needs[2] else hidden.new_empty(0),
    )


_library.impl("linear_logprobs", without_autocast(_linear_logprobs), "CompositeExplicitAutograd")
_library.impl("linear_logprobs_backward", without_autocast(_linear_logprobs_backward), "CompositeExplicitAutograd")
torch.library.register_fake("fastalign::linear_logprobs", _linear_logprobs_fake, lib=_library)
torch.library.register_fake("fastalign::linear_logprobs_backward", _linear_logprobs_backward_fake, lib=_library)


@register_flop_formula(torch.ops.fastalign.linear_logprobs)
def _forward_flop(hidden_shape, weight_shape, *args, **kwargs) -> int:
    grads, entropy = args[-3:-1]
    products = 1 + (1 + entropy if grads else 0)
    return products * 2 * hidden_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.fastalign.linear_logprobs_backward)
def _backward_flop(grad_shape, grad_entropy_shape, hidden_shape, weight_shape, *args, **kwargs) -> int:
    cache_shape, needs = args[3], args[-1]
    rows, (vocab, width) = hidden_shape[0], weight_shape
    cached = cache_shape[0] if len(cache_shape) == 2 and grad_entropy_shape is None else 0
    return 2 * vocab * width * (rows * sum(needs[:2]) + max(rows - cached, 0))


class _LogprobsCall(NamedTuple):
    """The arguments of one call that are not tensors."""

    logit_scale: float
    softcap: float | None
    temperature: float
    ignore_index: int | None
    entropy: bool
    cache_rows: int
    frozen: bool  # whether hidden needs a gradient, weight and bias need none, and the forward pass makes it
    backend: Backend


class _LinearLogprobs(torch.autograd.Function):
    """The op over N rows, where N counts all rows of `hidden`, ignored ones included.

    For a frozen output layer it saves d logprob / d hidden (N, H), for a trainable one the statistics (N, 5) and the
    cached tiles.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, call: _LogprobsCall):
        logprobs, entropy, grad_logprobs, grad_entropy, stats, cache, shifts = torch.ops.fastalign.linear_logprobs(
            hidden, weight, targets, bias, *call[:4], call.frozen, call.entropy, call.cache_rows, backend=call.backend
        )
        ctx.call, ctx.hidden_dtype = call, hidden.dtype
        # d logp / d hidden = W[y] - sum_j p_j W[j] does not depend on the loss. With a frozen output layer it was
        # computed together with the log-probs, in one pass over the vocabulary, and nothing else is needed later.
        if call.frozen:
            ctx.save_for_backward(grad_logprobs, grad_entropy)
        else:
            ctx.save_for_backward(hidden, weight, targets, bias, stats, cache, shifts)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs, d_entropy):
        call = ctx.call
        if call.frozen:  # the gradient is known up to a factor per row
            grad_logprobs, grad_entropy = ctx.saved_tensors
            d_hidden = grad_logprobs * d_logprobs.unsqueeze(1)
            if call.entropy:
                d_hidden = d_hidden.addcmul_(grad_entropy, d_entropy.unsqueeze(1))
            return d_hidden.to(ctx.hidden_dtype), None, None, None, None
        hidden, weight, targets, bias, stats, cache, shifts = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
        d_hidden, d_weight, d_bias = torch.ops.fastalign.linear_logprobs_backward(
            d_logprobs, d_entropy if call.entropy else None, hidden, weight, targets, bias, stats, cache, shifts,
            *call[:4], needs, backend=call.backend,
        )  # fmt: skip
        grads = [g if need else None for g, need in zip((d_hidden, d_weight, d_bias), needs, strict=True)]
        return grads[0], grads[1], None, grads[2], None


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    lora: Lora | None = ...,
    new_rows: NewRows | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int | None = ...,
    entropy: Literal[False] = ...,
    memory_budget: int | None = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    lora: Lora | None = ...,
    new_rows: NewRows | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int | None = ...,
    entropy: Literal[True],
    memory_budget: int | None = ...,
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    lora: Lora | None = ...,
    new_rows: NewRows | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int | None = ...,
    entropy: bool,
    memory_budget: int | None = ...,
    backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    new_rows: NewRows | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    entropy: bool = False,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token from hidden states, and optionally the entropy of its distribution.

        u = logit_scale * (h W' + b)
        z = softcap * tanh(u / softcap) / temperature, or u / temperature without a soft cap
        logprob = z_y - logsumexp(z)        entropy = -sum_j p_j log p_j  with  p = softmax(z)

    The (rows, vocabulary) logits are computed one tile at a time. With a frozen output layer the extra memory is
    O(rows x H) plus a few tiles, whatever V is: tens of MB on a CPU, about a thousandth of the memory on a GPU. A
    trainable output layer adds the cached tiles (see `memory_budget`) and the gradient of weight, (V, H). Products of
    bfloat16 and float16 inputs are summed in float32 and stay float32. The result is differentiable (once) in hidden,
    weight and bias.

    **The shift is the caller's.** `targets[i]` is the token that `hidden[i]` predicts: the *next* token. A model's
    unshifted `input_ids` are wrong: from hidden states (B, T, H) and input_ids (B, T) pass `hidden[:, :-1]` and
    `input_ids[:, 1:]`.

    d logprob / d hidden = W[y] - sum_j p_j W[j] does not depend on the loss. With a frozen output layer, loss and
    gradient therefore need one pass over the vocabulary instead of two.

    **Heads that are no single matrix.** A packed weight is dequantised one tile of the vocabulary at a time, into one
    buffer. A LoRA adapter on the output layer widens hidden states and tiles, `[h, h a'] [W, scale * b]'`, so that its
    sum with W is neither formed nor rounded: see `head/weights.py` and `head/chunked_logprobs.py`. One pass gives the
    gradients in hidden and in a, and that of b forms the probabilities again. Such calls are not traced by
    torch.compile.

    While a CUDA graph is captured, ignored rows cannot be dropped. They are computed on zero inputs and cost time.

    Args:
        hidden: (..., H) floating.
        weight: (V, H) floating, the output layer's. Where its dtype differs from hidden's, both are
            converted to torch's common dtype (`torch.promote_types`): float32 for bfloat16 and float16. Or a frozen
            weight in 4 or 8 bits (`PackedWeight`), such as `fastalign.models.quantized_weight(layer)`.
        targets: (...) int64 in [0, V) or `ignore_index`.
        bias: (V,) floating. An entry of -inf rules its token out.
        lora: (a (r, H), b (V, r), scale) of an adapter that adds `scale * b a` to a frozen weight. Both factors may be
            trained. In 16-bit products they are rounded to 16 bits, as autocast does.
        new_rows: (ids (k,) int64, rows (k, H)): rows that take the place of those of a frozen weight, and may be
            trained.
        logit_scale: Multiplies `h W' + b`.
        softcap: Bounds the logits before the temperature, as Gemma does; above 0, or None.
        temperature: Divides the logits; above 0.
        ignore_index: The target of rows that do not count. Those are dropped before any product, return 0 and get zero
            gradient. None: every row has a target. On a GPU this avoids a synchronisation.
        entropy: Whether to return the entropies too.
        memory_budget: Bytes of probability tiles that are cached for the backward pass of a trainable output layer
            (default: 1 GiB). With U = 2 N V H, where N is the number of rows with a target, forward and backward take
            3U FLOP for rows whose tiles fit, and 4U for the others. A frozen output layer needs no cache, and takes
            2U. The entropy's gradient through a trainable output layer always recomputes.
        backend: One of
            "torch": the tiled driver, on any device and dtype;
            "triton", "cuda": the same on a GPU, with fastalign's kernels between the products;
            "anchored": whole products over the vocabulary, on a GPU of compute capability 9.0 or more, for bfloat16 and
            float16 whose width is a multiple of 8 (see fastalign/ops/head/anchored.py);
            "cpu": C++;
            "reference": materialises the logits;
            "auto": on a GPU the first of "anchored", "triton" and "cuda" that runs; on the CPU "cpu" where it is
            faster; else "torch".

    Returns:
        logprobs shaped like targets, or (logprobs, entropies): float32, or float64 for float64 inputs.

    Raises:
        InputError: A shape, dtype, device, target or option does not fit.
        BackendError: There is no such backend, or the backend that was named cannot run.

    Examples:
        >>> hidden, weight = torch.randn(6, 16), torch.randn(100, 16)
        >>> logprobs = linear_logprobs(hidden, weight, torch.tensor([3, 1, 4, 1, 5, -100]))
        >>> logprobs.shape, logprobs[-1].item()
        (torch.Size([6]), 0.0)
    """
    check_linear(hidden, weight, bias, softcap, logit_scale)
    check_targets(targets, hidden.shape[:-1], of="hidden")
    check_devices(hidden, weight, targets, bias)
    check_temperature(temperature)
    check_memory_budget(memory_budget)
    check_ignore_index(ignore_index)
    is_composed = lora is not None or new_rows is not None or not isinstance(weight, Tensor)
    if is_composed:
        check_composed(weight, lora, new_rows)
        check_devices(hidden, *(lora or ())[:2], *(new_rows or ()))
    dense = weight if isinstance(weight, Tensor) else None
    backend = pick.resolve(
        "linear_logprobs", backend, hidden, dense, bias, backends=BACKENDS, cpu_kernel="forward",
        prefer=("anchored", "triton"),
        why_not=lambda name: "it takes a dense weight alone" if is_composed and name == "anchored" else None,
    )  # fmt: skip
    if is_composed and backend == "reference":
        dense = ComposedWeight(weight, *(lora or (None, None, 1.0))[1:], new_rows).dense(
            None if lora is None else lora[0], reference.compute_dtype(hidden)
        )
    if backend == "reference":
        assert dense is not None, "a weight that is no tensor is composed"
        check_target_ids(targets, dense.shape[0], ignore_index, op="linear_logprobs")
        return reference.linear_logprobs(
            hidden, dense, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
            ignore_index=ignore_index, entropy=entropy,
        )  # fmt: skip
    if is_composed or not isinstance(weight, Tensor):
        transform = LogitTransform(float(logit_scale), None if softcap is None else float(softcap), float(temperature))
        return chunked_logprobs(
            hidden, weight, targets, bias, lora, new_rows, transform, ignore_index=ignore_index, entropy=entropy,
            backend=backend,
        )  # fmt: skip
    if hidden.dtype != weight.dtype:
        common = torch.promote_types(hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(common), weight.to(common)
    needs_grad = torch.is_grad_enabled()
    trainable = needs_grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    cache_rows = 0
    # The anchored driver forms some gradients in the backward pass even where the output layer is frozen.
    at_once = backend != "anchored" or anchored.keeps_exponentials(hidden.dtype, bias, entropy=entropy)
    if trainable and not entropy and at_once:
        budget = DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget
        row_bytes = weight.shape[0] * hidden.element_size()
        if backend == "cpu":
            cache_rows = cpu_head.cacheable_scored_rows(targets, ignore_index, hidden.dtype, row_bytes, budget)
        else:  # counting the scored rows would wait for the GPU
            cache_rows = logprobs_tiles.cacheable_rows(targets.numel(), row_bytes, budget)
    call = _LogprobsCall(
        float(logit_scale), None if softcap is None else float(softcap), float(temperature), ignore_index, entropy,
        cache_rows, at_once and needs_grad and not trainable and hidden.requires_grad, backend,
    )  # fmt: skip
    flat = hidden.reshape(-1, hidden.shape[-1])
    logprobs, entropies = _LinearLogprobs.apply(flat, weight, targets.reshape(-1), bias, call)
    logprobs = logprobs.view(targets.shape)
    return (logprobs, entropies.view(targets.shape)) if entropy else logprobs
