"""Per-sequence sums of packed values: schema, fake, autograd and the public function, top to bottom."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.errors import BackendError, InputError

try:
    from fastalign import _cpu as native
except ImportError:  # a checkout that was not built; `fastalign info` says so, and backend="cpu" raises
    native = None

BACKENDS = ("auto", "reference", "torch", "cpu")

_library = torch.library.Library("fastalign", "FRAGMENT")
_library.define("segment_sum(Tensor values, Tensor cu_seqlens, str backend) -> Tensor")


def check_offsets(values: Tensor, cu_seqlens: Tensor) -> None:
    """Looks at values, so it runs inside the op, where a compiler does not look; on a GPU it would wait for them."""
    if values.device.type != "cpu":
        return
    ends_fit = cu_seqlens[0] == 0 and cu_seqlens[-1] == values.shape[0]
    if not ends_fit or (cu_seqlens.diff() < 0).any():
        raise InputError(f"cu_seqlens is {cu_seqlens.tolist()[:8]}...; it must rise from 0 to N={values.shape[0]}")


def _segment_sum(values: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    check_offsets(values, cu_seqlens)
    if backend == "cpu":
        values, cu_seqlens = values.contiguous(), cu_seqlens.contiguous()
        out = values.new_empty(cu_seqlens.numel() - 1)
        run = native.segment_sum_f64 if values.dtype == torch.float64 else native.segment_sum_f32
        run(values.data_ptr(), cu_seqlens.data_ptr(), out.numel(), out.data_ptr())
        return out
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, axis=0, initial=0.0)


_library.impl("segment_sum", _segment_sum, "CompositeExplicitAutograd")


@torch.library.register_fake("fastalign::segment_sum", lib=_library)
def _segment_sum_fake(values, cu_seqlens, backend):
    return values.new_empty(cu_seqlens.shape[0] - 1)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, cu_seqlens, backend):
        ctx.save_for_backward(cu_seqlens)
        ctx.count = values.shape[0]
        return torch.ops.fastalign.segment_sum(values, cu_seqlens, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (cu_seqlens,) = ctx.saved_tensors
        return grad.repeat_interleave(cu_seqlens.diff(), output_size=ctx.count), None, None


def segment_sum(values: Tensor, cu_seqlens: Tensor, *, backend: str = "auto") -> Tensor:
    """`out[i] = sum(values[cu_seqlens[i] : cu_seqlens[i + 1]])`: token values to one number a sequence.

    values: (N,) floating. cu_seqlens: (S + 1,) int64, rising from 0 to N. Returns (S,) float32, or float64 for
    float64 values; an empty segment gives 0. backend: "cpu" (C++, summed in float64), "torch" (any device),
    "reference", or "auto" (cpu where it is built and the values lie there). InputError names a wrong shape, dtype or
    offset; BackendError a backend that cannot run here.
    """
    if values.dim() != 1 or not values.is_floating_point():
        raise InputError(f"values is {tuple(values.shape)} {values.dtype}; it must be (N,) and floating")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int64 or cu_seqlens.numel() == 0:
        raise InputError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be (S + 1,) int64 offsets from 0 to N"
        )
    if values.device != cu_seqlens.device:
        raise InputError(f"values lies on {values.device}, cu_seqlens on {cu_seqlens.device}; move them to one device")
    on_cpu = values.device.type == "cpu"
    if backend == "auto":
        backend = "cpu" if on_cpu and native is not None else "torch"
    values = values.to(reference.compute_dtype(values))
    if backend == "reference":
        check_offsets(values, cu_seqlens)
        return reference.segment_sum(values, cu_seqlens)
    if backend == "cpu" and (native is None or not on_cpu):
        why = "the native module is missing, run `make build`" if native is None else f"values lies on {values.device}"
        raise BackendError(f"backend='cpu' cannot run segment_sum here: {why}")
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; segment_sum has {', '.join(BACKENDS)}")
    return _SegmentSum.apply(values, cu_seqlens, backend)
