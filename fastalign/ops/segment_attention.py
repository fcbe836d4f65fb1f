"""Attention over packed rows on the CPU: one native call each way for all segments and heads.

SDPA takes a call per segment, a copy of the prompt's keys for each further completion, and a backward pass that is slow
over short segments. Here keys are read where they lie, and a prompt's gradient is summed over its completions in one
accumulator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.ops.backends import cpu


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes this, and faster than SDPA: one row on the CPU, of one dtype, not in float64.

    With many threads, few key heads and one long group SDPA's backward pass may be faster: here a key head of a group
    is one thread's.
    """
    one_row = len(query) == 1 and key.shape[:3] == value.shape[:3] == (1, key.shape[1], query.shape[2])
    if not one_row or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        return False
    if not query.dtype == key.dtype == value.dtype or torch._C._are_functorch_transforms_active():
        return False
    unable = cpu.why_not(query, key, value) or cpu.why_no_kernel("attention")
    return not unable and cpu.is_fast(query.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, window: int | None, scaling: float) -> Tensor:
    """`reference.segment_attention`: softmax(scaling q k') v, each query over what it sees of its segment.

    Args:
        query: (1, heads, T, D). key: (1, key_heads, T, D). value: (1, key_heads, T, Dv). What `takes` says yes to, or
            float64; nothing is checked here.
        segments: (S, 4) int64 on the CPU, as there. They follow each other from token 0 to T; one without a prefix
            begins a group, and a prefix lies in the first segment of its group.
        window: how many keys a query sees at most, itself among them; None: all. scaling: of the scores.

    Returns:
        (1, T, heads, Dv), of the inputs' dtype.
    """
    return _Attention.apply(query, key, value, segments, window or query.shape[2], scaling).unsqueeze(0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, segments, window, scaling):
        q, k, v = (_rows(t[0]) for t in (query, key, value))  # (heads, T, width)
        out = q.new_empty(q.shape[1], q.shape[0], v.shape[2])
        log_sums = q.new_empty(out.shape[:2], dtype=reference.compute_dtype(q))
        ctx.save_for_backward(q, k, v, out, log_sums, segments)
        ctx.options = window, scaling
        _run(q, k, v, out, log_sums, segments, window, scaling)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, log_sums, segments = ctx.saved_tensors
        grads = [t.new_empty(t.shape[1], t.shape[0], t.shape[2]) for t in (q, k, v)]
        _run(q, k, v, out, log_sums, segments, *ctx.options, _rows(grad.transpose(0, 1)), grads)
        return *(t.transpose(0, 1).unsqueeze(0) for t in grads), None, None, None


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _run(q, k, v, out, log_sums, segments, window, scaling, grad=None, grads=(None, None, None)) -> None:
    problem = cpu.module.AttentionProblem()
    problem.dtype = cpu.dtype_code(q.dtype)
    problem.heads, problem.key_heads, problem.width, problem.value_width = len(q), len(k), q.shape[2], v.shape[2]
    problem.query, problem.key, problem.value = map(_heads, (q, k, v))
    problem.grad = _heads(grad)
    problem.segments, problem.count = segments.data_ptr(), len(segments)
    problem.scaling, problem.window = scaling, window
    problem.out, problem.log_sums = out.data_ptr(), log_sums.data_ptr()
    problem.d_query, problem.d_key, problem.d_value = (0 if t is None else t.data_ptr() for t in grads)
    cpu.run("attention", problem)


def _heads(t: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else (t.data_ptr(), t.stride(0), t.stride(1))
