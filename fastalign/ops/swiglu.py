"""SwiGLU between its products, `silu(gate) * up`: schema, kernels, fakes, autograd and the public function.

Models take it in two passes, and save the result of the first one for the backward pass. The C++ kernel takes one pass,
and saves gate and up alone, which exist anyway. On a GPU it is torch's two passes, but what is saved is the same.

Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from fastalign import reference
from fastalign.errors import InputError
from fastalign.ops.backends import cpu, pick
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head.checks import check_devices

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch", "cpu")

_library = torch.library.Library("fastalign", "FRAGMENT")
_library.define("swiglu(Tensor gate, Tensor up, str backend) -> Tensor")
# Returns the gradients in gate and up.
_library.define("swiglu_backward(Tensor grad, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)")


def _swiglu(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    return cpu.swiglu(gate, up) if backend == "cpu" else silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    if backend == "cpu":
        return cpu.swiglu_backward(grad, gate, up)
    return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


_library.impl("swiglu", _swiglu, "CompositeExplicitAutograd")
_library.impl("swiglu_backward", _swiglu_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastalign::swiglu", lib=_library)
def _swiglu_fake(gate, up, backend):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastalign::swiglu_backward", lib=_library)
def _swiglu_backward_fake(grad, gate, up, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, backend):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return torch.ops.fastalign.swiglu(gate, up, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *torch.ops.fastalign.swiglu_backward(grad, *ctx.saved_tensors, ctx.backend), None


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The gated activation `silu(gate) * up` with `silu(g) = g / (1 + exp(-g))`.

    It is differentiable (once) in both.

    Args:
        gate: (...) floating.
        up: Of gate's shape and dtype.
        backend: "cpu" (C++, one pass), "torch" (any device), "reference", or "auto": "cpu" where it takes the tensors,
            else "torch".

    Returns:
        (...) in gate's dtype. C++ computes in float32, or float64 for float64, and rounds once.

    Raises:
        InputError: Shapes, dtypes or devices differ.
        BackendError: There is no such backend, or the backend that was named cannot run.

    References:
        Shazeer 2020, GLU variants improve transformer, arXiv:2002.05202.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.is_floating_point():
        raise InputError(
            f"gate is {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype}; they must be of one shape "
            "and one floating dtype"
        )
    check_devices(gate, up)
    backend = pick.resolve("swiglu", backend, gate, up, backends=BACKENDS, cpu_kernel="gated", only_if_fast=False)
    if backend == "reference":
        return reference.swiglu(gate, up).to(gate.dtype)
    return _Swiglu.apply(gate, up, backend)
