"""Attention over packed rows on the CPU: one native call each way for all segments and heads.

SDPA would take one call per segment and a copy of the prompt's keys for each further completion, and its backward pass
is slow over short segments. Here keys are read where they lie, and a prompt's gradient is added up over its completions
in one accumulator. Top to bottom: schema, kernels, fakes, autograd, and the public functions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from fastalign import reference
from fastalign.errors import InputError
from fastalign.ops.backends import cpu, pick
from fastalign.ops.backends.pick import Backend

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch", "cpu")

_library = torch.library.Library("fastalign", "FRAGMENT")
# query (heads, T, D), key (key_heads, T, D), value (key_heads, T, Dv). Returns the output (T, heads, Dv) and the
# logarithm of each softmax's normaliser (T, heads).
_library.define(
    "segment_attention(Tensor query, Tensor key, Tensor value, Tensor segments, int window, float scaling) "
    "-> (Tensor, Tensor)"
)
# grad (heads, T, Dv). Returns the gradients in query, key and value as (T, heads, width).
_library.define(
    "segment_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sums, "
    "Tensor segments, int window, float scaling) -> (Tensor, Tensor, Tensor)"
)


def _segment_attention(query, key, value, segments, window, scaling):
    query, key, value = map(cpu.unit_stride, (query, key, value))
    out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    log_sums = query.new_empty(out.shape[:2], dtype=reference.compute_dtype(query))
    cpu.segment_attention(query, key, value, out, log_sums, segments.contiguous(), window, scaling)
    return out, log_sums


def _segment_attention_backward(grad, query, key, value, out, log_sums, segments, window, scaling):
    grad, query, key, value = map(cpu.unit_stride, (grad, query, key, value))
    grads = _new_gradients(query, key, value)
    cpu.segment_attention(
        query, key, value, out.contiguous(), log_sums.contiguous(), segments.contiguous(), window, scaling, grad, grads
    )
    return grads


def _new_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape[1], t.shape[0], t.shape[2]) for t in inputs)


_library.impl("segment_attention", _segment_attention, "CompositeExplicitAutograd")
_library.impl("segment_attention_backward", _segment_attention_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastalign::segment_attention", lib=_library)
def _segment_attention_fake(query, key, value, segments, window, scaling):
    out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    return out, query.new_empty(out.shape[:2], dtype=reference.compute_dtype(query))


@torch.library.register_fake("fastalign::segment_attention_backward", lib=_library)
def _segment_attention_backward_fake(grad, query, key, value, out, log_sums, segments, window, scaling):
    return _new_gradients(query, key, value)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, segments, window, scaling):
        q, k, v = (cpu.unit_stride(t[0]) for t in (query, key, value))  # (heads, T, width)
        out, log_sums = torch.ops.fastalign.segment_attention(q, k, v, segments, window, scaling)
        ctx.save_for_backward(q, k, v, out, log_sums, segments)
        ctx.options = window, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = torch.ops.fastalign.segment_attention_backward(grad.transpose(0, 1), *ctx.saved_tensors, *ctx.options)
        return *(t.transpose(0, 1).unsqueeze(0) for t in grads), None, None, None


def beats_sdpa(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes attention over these tensors, and faster than SDPA.

    That is so for one row on the CPU, of one dtype that is not float64, with vector instructions. An exception that is
    not looked for: with many threads, few key heads and one long group, SDPA's backward pass may be faster, because
    here a key head of a group belongs to one thread.
    """
    one_row = len(query) == 1 and key.shape[:3] == value.shape[:3] == (1, key.shape[1], query.shape[2])
    if not one_row or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        return False
    # Under torch.func's transforms tensors have no address.
    if not query.dtype == key.dtype == value.dtype or torch._C._are_functorch_transforms_active():
        return False
    return cpu.is_fast(query.dtype) and not (cpu.why_not(query, key, value) or cpu.why_no_kernel("attention"))


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    window: int | None = None,
    scaling: float | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Attention in a packed row, `softmax(scaling q k') v`, where each token sees its segment and the segment's prefix.

    `reference.seen_keys` defines which keys a token sees. The result is differentiable (once) in query, key and value.

    Args:
        query: (1, heads, T, D) floating.
        key: (1, key_heads, T, D) of query's dtype, where key_heads divides heads.
        value: (1, key_heads, T, Dv) of query's dtype.
        segments: (S, 4) int64 on the CPU: first token, length, first token of the prefix and its length. Segments
            follow each other from token 0 to T. One without a prefix begins a group, and a prefix lies in the first
            segment of its group. This is not checked.
        window: How many keys a query sees at most, itself among them; None: all.
        scaling: Multiplies the scores; None: 1 / sqrt(D).
        backend: "cpu" (C++), "torch" (SDPA with a (T, T) mask, any device), "reference", or "auto": on the CPU "cpu"
            where it is fast, else "torch".

    Returns:
        (1, T, heads, Dv) in query's dtype.

    Raises:
        InputError: A shape or dtype does not fit.
        BackendError: There is no such backend, or the backend that was named cannot run.
    """
    _check(query, key, value, segments)
    backend = pick.resolve(
        "segment_attention", backend, query, key, value, backends=BACKENDS, cpu_kernel="attention"
    )  # fmt: skip
    scale: float = query.shape[3] ** -0.5 if scaling is None else scaling
    if backend == "cpu":
        window = query.shape[2] if window is None else window
        return _SegmentAttention.apply(query, key, value, segments, window, scale).unsqueeze(0)
    if backend == "reference":
        return reference.segment_attention(query, key, value, segments, window, scale).to(query.dtype)
    seen = reference.seen_keys(segments, window).to(query.device)  # (T, T)
    return scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=True).transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> None:
    shapes = f"query is {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise InputError(f"{shapes}; they must be (1, heads, T, width)")
    one_row = len(query) == 1 and key.shape[:3] == value.shape[:3] == (1, key.shape[1], query.shape[2])
    if not one_row or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise InputError(
            f"{shapes}; they must be (1, heads, T, D), (1, key_heads, T, D) and (1, key_heads, T, Dv), where key_heads "
            "divides heads"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(f"query is {query.dtype}, key {key.dtype} and value {value.dtype}; they must be of one dtype")
    if segments.dim() != 2 or segments.shape[1] != 4 or segments.dtype != torch.int64 or segments.device.type != "cpu":
        raise InputError(
            f"segments is {tuple(segments.shape)} {segments.dtype} on {segments.device}; it must be (S, 4) int64 on "
            "the CPU"
        )
