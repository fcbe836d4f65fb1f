"""Per-sequence sums of packed values: schema, kernels, fake, autograd and the public function, top to bottom."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.errors import InputError
from fastalign.ops.backends import cpu, pick
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head.checks import check_devices
from fastalign.ops.offsets import as_offsets, check_offsets

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch", "cpu")

_library = torch.library.Library("fastalign", "FRAGMENT")
_library.define("segment_sum(Tensor values, Tensor cu_seqlens, str backend) -> Tensor")


def _segment_sum(values: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    if values.device.type == "cpu":  # on a GPU the check would wait for the offsets
        check_offsets(cu_seqlens, values.shape[0])
    if backend == "cpu":
        return cpu.segment_sum(values, cu_seqlens)
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


def segment_sum(values: Tensor, cu_seqlens: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The sum of each sequence's values: `out[i] = sum(values[cu_seqlens[i] : cu_seqlens[i + 1]])`.

    Args:
        values: (N,) floating, one per token of the packed sequences.
        cu_seqlens: (S + 1,) int64 or int32, rising from 0 to N.
        backend: "cpu" (C++, added up in float64), "torch" (any device), "reference", or "auto": "cpu" where it is built
            and the values lie there, else "torch".

    Returns:
        (S,) float32, or float64 for float64 values. An empty sequence gives 0.

    Raises:
        InputError: A shape, dtype, device or offset does not fit.
        BackendError: The backend is unknown, or cannot run here.

    Examples:
        >>> segment_sum(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]))
        tensor([3., 3.])
    """
    if values.dim() != 1 or not values.is_floating_point():
        raise InputError(f"values is {tuple(values.shape)} {values.dtype}; it must be (N,) and floating")
    cu_seqlens = as_offsets(cu_seqlens)
    check_devices(values, cu_seqlens)
    values = values.to(reference.compute_dtype(values))
    backend = pick.resolve(
        "segment_sum", backend, values, backends=BACKENDS, cpu_kernel="segment_sum_f32", only_if_fast=False
    )
    if backend == "reference":
        check_offsets(cu_seqlens, values.shape[0])
        return reference.segment_sum(values, cu_seqlens)
    return _SegmentSum.apply(values, cu_seqlens, backend)
