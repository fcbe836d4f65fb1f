"""RMSNorm in one pass: schema, kernels, fakes, autograd and the public function, top to bottom.

Models take RMSNorm in eight passes, most of them over float32 copies, and save two of those copies for the backward
pass. The C++ kernel reads x once, and saves x and one number per row. What it adds up and multiplies in float32 is
rounded once, at the end.

Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.errors import InputError
from fastalign.ops.backends import cpu, pick
from fastalign.ops.backends.pick import Backend

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch", "cpu")

_library = torch.library.Library("fastalign", "FRAGMENT")
# Returns the norm (..., H) and 1 / sqrt(mean(x^2) + eps) of each row (...).
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
# Returns d loss / d x. scale is what `rms_norm` returned.
_library.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, float eps) -> Tensor")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    scale = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return cpu.rms_norm(x, weight, scale, None, eps), scale


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    return cpu.rms_norm(x.contiguous(), weight.contiguous(), scale.contiguous(), grad.contiguous(), eps)


_library.impl("rms_norm", _rms_norm, "CompositeExplicitAutograd")
_library.impl("rms_norm_backward", _rms_norm_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastalign::rms_norm", lib=_library)
def _rms_norm_fake(x, weight, eps):
    scale = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=torch.contiguous_format), scale


@torch.library.register_fake("fastalign::rms_norm_backward", lib=_library)
def _rms_norm_backward_fake(grad, x, weight, scale, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x, weight = x.contiguous(), weight.contiguous()
        out, scale = torch.ops.fastalign.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = torch.ops.fastalign.rms_norm_backward(grad, x, weight, scale, ctx.eps)
        if ctx.needs_input_grad[1]:
            d_weight = (grad * (x * scale.unsqueeze(-1))).sum_to_size(weight.shape).to(weight.dtype)
        return d_x, d_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor:
    """Root mean square norm `x w / sqrt(mean(x^2) + eps)`, the mean over the last dimension.

    It is differentiable (once) in x and weight.

    Args:
        x: (..., H) floating.
        weight: (H,) of x's dtype.
        eps: Added to the mean of squares.
        backend: "cpu" (C++, one pass), "torch" (torch's own kernel, any device), "reference", or "auto": "cpu" where it
            takes the tensors, else "torch".

    Returns:
        (..., H) in x's dtype, also under autocast. It is computed in float32, or float64 for float64.

    Raises:
        InputError: A shape or dtype does not fit.
        BackendError: There is no such backend, or the backend that was named cannot run.

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise InputError(f"x is {x.dtype} and weight {weight.dtype}; they must be of one floating dtype")
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise InputError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be (..., H) and (H,)")
    backend = pick.resolve(
        "rms_norm", backend, x, weight, backends=BACKENDS, cpu_kernel="rms_norm", only_if_fast=False
    )  # fmt: skip
    if backend == "cpu":
        return _RmsNorm.apply(x, weight, eps)
    if backend == "torch":
        return F.rms_norm(x, weight.shape, weight, eps).to(x.dtype)  # a GPU's autocast returns float32
    return reference.rms_norm(x, weight, eps).to(x.dtype)
