"""Token log-probabilities straight from hidden states, without the `[tokens, vocabulary]` logits.

Schema, fake, autograd and the public function, top to bottom; the arithmetic is in `tiles.py` and `epilogue.py`, in C++
in csrc/cpu, and for GPUs in kernels/ and csrc/cuda.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.backends import cpu, pick
from fastalign.ops.backends.pick import BACKENDS, without_autocast
from fastalign.ops.head import logprobs_tiles
from fastalign.ops.head.epilogue import TORCH, Epilogue
from fastalign.ops.head.rows import find_scored_rows, gather_rows, pad_rows, scatter_rows

# Probability tiles kept for a trainable head when the caller names no budget, in bytes.
DEFAULT_MEMORY_BUDGET = 1 << 30


_library = torch.library.Library("fastalign", "DEF")


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
    return pick.KERNELS[backend].epilogue() if backend in pick.KERNELS else TORCH


def _linear_logprobs(
    hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index, grads, entropy, cache_rows,
    *, backend="torch",
):  # fmt: skip
    n = targets.shape[0]
    scored = find_scored_rows(targets, ignore_index, weight.shape[0])
    if backend == "cpu":
        return cpu.linear_logprobs(
            hidden, weight, targets, scored.rows, bias, logit_scale, softcap, temperature, grads, entropy, cache_rows
        )
    out = logprobs_tiles.forward(
        gather_rows(hidden, scored),
        weight,
        pad_rows(scored.targets),
        None if bias is None else bias.contiguous(),
        logprobs_tiles.Head(logit_scale, softcap, temperature),
        grads=grads,
        entropy=entropy,
        cache_rows=cache_rows,
        epilogue=_epilogue(backend),
    )
    empty = out.logprobs.new_empty(0)
    cache, shifts = out.cache or (hidden.new_empty(0), empty.clone())
    return (
        scatter_rows(out.logprobs, scored, n),
        scatter_rows(out.entropy, scored, n) if entropy else empty,
        scatter_rows(out.grad_logprobs, scored, n) if grads else empty.clone(),
        scatter_rows(out.grad_entropy, scored, n) if grads and entropy else empty.clone(),
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
    shifts = cpu.cache_shifts(vocab) if backend == "cpu" else len(logprobs_tiles.vocabulary_tiles(vocab, hidden.device))
    return (
        new.new_empty(n),
        new.new_empty(n if entropy else 0),
        new.new_empty((n, width) if grads else 0),
        new.new_empty((n, width) if grads and entropy else 0),
        new.new_empty(n, len(logprobs_tiles.Stats._fields)),
        hidden.new_empty((cache_rows, vocab) if cache_rows else 0),
        new.new_empty((cache_rows, shifts) if cache_rows else 0),
    )


def _linear_logprobs_backward(
    grad_logprobs, grad_entropy, hidden, weight, targets, bias, stats, cache, shifts,
    logit_scale, softcap, temperature, ignore_index, needs, *, backend="torch",
):  # fmt: skip
    n = targets.shape[0]
    scored = find_scored_rows(targets, ignore_index, weight.shape[0])
    empty = hidden.new_empty(0)
    if backend == "cpu":
        grads = cpu.linear_logprobs_backward(
            grad_logprobs, grad_entropy, hidden, weight, targets, scored.rows, bias, stats, cache, shifts,
            logit_scale, softcap, temperature, needs,
        )  # fmt: skip
        return tuple(empty.clone() if g is None else g for g in grads)
    row_stats = logprobs_tiles.Stats(*gather_rows(stats, scored).t().contiguous().unbind(0))
    padding = (row_stats.others + row_stats.target) == 0
    # Else 0 / 0, and 0 times the overflow of a logit.
    row_stats = row_stats._replace(
        others=row_stats.others.masked_fill(padding, 1.0), shift=row_stats.shift.masked_fill(padding, math.inf)
    )
    d_hidden, d_weight, d_bias = logprobs_tiles.backward(
        gather_rows(grad_logprobs, scored),
        None if grad_entropy is None else gather_rows(grad_entropy, scored),
        gather_rows(hidden, scored),
        weight,
        pad_rows(scored.targets),
        None if bias is None else bias.contiguous(),
        logprobs_tiles.Head(logit_scale, softcap, temperature),
        row_stats,
        logprobs_tiles.Cache(cache, shifts) if cache.numel() else None,
        needs=tuple(needs),
        epilogue=_epilogue(backend),
    )
    return (
        scatter_rows(d_hidden, scored, n).to(hidden.dtype) if needs[0] else empty,
        d_weight if needs[1] else empty.clone(),
        d_bias if needs[2] else empty.clone(),
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
    kept = cache_shape[0] if len(cache_shape) == 2 and grad_entropy_shape is None else 0
    return 2 * vocab * width * (rows * sum(needs[:2]) + max(rows - kept, 0))


class _Options(NamedTuple):
    """The op's arguments beside the tensors."""

    logit_scale: float
    softcap: float | None
    temperature: float
    ignore_index: int | None
    entropy: bool
    cache_rows: int
    frozen: bool
    backend: str


class _LinearLogprobs(torch.autograd.Function):
    """Frozen head: the forward pass keeps d logprob / d hidden (N, H). Trainable head: statistics and tiles."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, options: _Options):
        logprobs, entropy, grad_logprobs, grad_entropy, stats, cache, shifts = torch.ops.fastalign.linear_logprobs(
            hidden, weight, targets, bias, *options[:4], options.frozen, options.entropy, options.cache_rows,
            backend=options.backend,
        )  # fmt: skip
        ctx.options, ctx.hidden_dtype = options, hidden.dtype
        if options.frozen:
            ctx.save_for_backward(grad_logprobs, grad_entropy)
        else:
            ctx.save_for_backward(hidden, weight, targets, bias, stats, cache, shifts)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs, d_entropy):
        options = ctx.options
        if options.frozen:
            grad_logprobs, grad_entropy = ctx.saved_tensors
            d_hidden = grad_logprobs * d_logprobs.unsqueeze(1)
            if options.entropy:
                d_hidden = d_hidden.addcmul_(grad_entropy, d_entropy.unsqueeze(1))
            return d_hidden.to(ctx.hidden_dtype), None, None, None, None
        hidden, weight, targets, bias, stats, cache, shifts = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
        d_hidden, d_weight, d_bias = torch.ops.fastalign.linear_logprobs_backward(
            d_logprobs, d_entropy if options.entropy else None, hidden, weight, targets, bias, stats, cache, shifts,
            *options[:4], needs, backend=options.backend,
        )  # fmt: skip
        grads = [g if need else None for g, need in zip((d_hidden, d_weight, d_bias), needs, strict=True)]
        return grads[0], grads[1], None, grads[2], None


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
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token, from hidden states, and optionally the entropy of its distribution.

    With `z = softcap * tanh(logit_scale * (h W' + b) / softcap) / temperature` (no cap: `logit_scale * (h W' + b) /
    temperature`), computes `z_y - logsumexp(z)` and `-sum_j p_j log p_j`, one (rows, vocabulary) tile at a time:
    extra memory is O(rows x H) + a constant, whatever V is. Differentiable (once) in hidden, weight and bias.

    hidden: (..., H) floating. weight: (V, H). targets: (...) int64 in [0, V) or `ignore_index`; ignored rows are
        dropped before any product, return 0 and get zero gradient. None: every row has a target, and on a GPU the
        host need not wait to learn how many. bias: (V,).
    memory_budget: bytes of probability tiles kept for the backward pass of a trainable head (default 1 GiB): 3U FLOP
        where they fit, 4U beyond, U = 2 N V H. A frozen head needs none of it, and 2U. The entropy's gradient
        through a trainable head always recomputes.
    backend: "torch" (the tiled driver), "triton" or "cuda" (the same with kernels of our own between its products, on
        a GPU), "cpu" (C++, where it is built), "reference" (materialises the logits), or "auto" (picks by device:
        "triton" where it is installed, else "cuda", on a GPU; "cpu" on the CPU where that is faster; else "torch").

    Returns logprobs shaped like targets, or (logprobs, entropy): float32, or float64 for float64 inputs. Products of
    bfloat16 and float16 inputs are accumulated and kept in float32. InputError names a wrong shape, dtype, device or
    target; BackendError an unknown backend, or one asked for by name that cannot run, and why. While a CUDA graph is
    captured nothing is dropped, and ignored rows are computed as zeros.

    The gradient in hidden is `W[y] - E_p[W]`: softmax attention with query h and key = value = W, hence one pass.
    """
    _check(hidden, weight, targets, bias, softcap, temperature)
    if memory_budget is not None and memory_budget < 0:
        raise InputError(f"memory_budget is {memory_budget}; it must be a number of bytes, or 0 to keep nothing")
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; linear_logprobs has {', '.join(BACKENDS)}")
    if backend == "reference":
        return reference.linear_logprobs(
            hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
            ignore_index=ignore_index, entropy=entropy,
        )  # fmt: skip
    backend = _resolve(backend, hidden, weight, bias)
    if hidden.dtype != weight.dtype:
        common = torch.promote_types(hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(common), weight.to(common)
    flat = hidden.reshape(-1, hidden.shape[-1])
    needs_grad = torch.is_grad_enabled()
    trainable = needs_grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    budget = DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget
    row_bytes = weight.shape[0] * hidden.element_size()
    cache_rows = 0
    if trainable and not entropy:
        cache_rows = _cacheable_rows(targets, ignore_index, hidden.dtype, row_bytes, budget, backend)
    frozen = needs_grad and not trainable and hidden.requires_grad
    options = _Options(
        float(logit_scale), None if softcap is None else float(softcap), float(temperature), ignore_index, entropy,
        cache_rows, frozen, backend,
    )  # fmt: skip
    logprobs, entropies = _LinearLogprobs.apply(flat, weight, targets.reshape(-1), bias, options)
    logprobs = logprobs.view(targets.shape)
    return (logprobs, entropies.view(targets.shape)) if entropy else logprobs


def _cacheable_rows(targets, ignore_index, dtype, row_bytes: int, budget: int, backend: str) -> int:
    rows = targets.numel()
    if backend != "cpu":  # counting would wait for the GPU
        return logprobs_tiles.cacheable_rows(rows, row_bytes, budget)
    if ignore_index is not None and not torch.compiler.is_compiling():  # a compiler cannot know how many are scored
        rows = int(targets.ne(ignore_index).sum())
    return cpu.cacheable_rows(rows, dtype, row_bytes, budget)


def _resolve(backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """What "auto" stands for here; BackendError where a backend was asked for by name and cannot run."""
    if backend == "torch":
        return backend
    if backend in pick.KERNELS:
        why = pick.KERNELS[backend].why_not(hidden, weight, bias)
        if why:
            raise BackendError(f"backend={backend!r} cannot run linear_logprobs here: {why}")
        return backend
    if backend == "auto" and (on_gpu := pick.pick(hidden, weight, bias, prefer="triton")):
        return on_gpu
    why = cpu.why_not(hidden, weight, bias)
    if backend == "cpu" or (cpu.refused and hidden.device.type == "cpu"):
        if why:
            raise BackendError(f"backend={backend!r} cannot run linear_logprobs here: {cpu.refused or why}")
        return "cpu"
    return "cpu" if why is None and cpu.is_fast(hidden.dtype) else "torch"


def _check(hidden, weight, targets, bias, softcap, temperature):
    for name, t in (("hidden", hidden), ("weight", weight)):
        if not t.is_floating_point():
            raise InputError(f"{name} is {t.dtype}; it must be a floating dtype, dequantise it first")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise InputError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}; they must be (..., H) and (V, H)"
        )
    if targets.dtype != torch.int64:
        raise InputError(f"targets is {targets.dtype}; it must be int64, call targets.long()")
    if targets.shape != hidden.shape[:-1]:
        raise InputError(
            f"targets is {tuple(targets.shape)}; it must be hidden's shape without the last, {tuple(hidden.shape[:-1])}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise InputError(
            f"bias is {tuple(bias.shape)} {bias.dtype}; it must be floating and ({weight.shape[0]},), one per row"
        )
    devices = {t.device for t in (hidden, weight, targets, bias) if t is not None}
    if len(devices) > 1:
        raise InputError(f"inputs lie on {sorted(map(str, devices))}; move them to one device")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap is {softcap}; it must be above 0, or None for no cap")
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; it must be above 0")
