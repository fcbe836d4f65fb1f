"""Norms and gated activations of a transformer's body: in few passes, which keep little for the backward pass.

Models take RMSNorm in eight passes, most of them over float32 copies, and keep two of those for the backward pass;
silu(gate) * up in two, of which the first is kept. Here x and one number a row are kept, or gate and up alone. On the
CPU both are one pass in C++, and what is summed or multiplied in float32 is rounded once. On a GPU the norm is torch's
own kernel, which rounds once too, and the gate takes torch's passes.
"""

from __future__ import annotations

import inspect
import types

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm, silu

from fastalign import reference
from fastalign.ops.backends import cpu

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ORDINARY = (Tensor, nn.Parameter)  # others may be spread or quantised


def speed_up_body(model: nn.Module) -> None:
    """Lets the model's RMSNorms and SwiGLU blocks take the passes above where they apply; changed in place.

    Modules are told by their parts, and by computing the same as `reference.rms_norm` or `reference.gated` on a few
    numbers. Each call looks whether it applies (on one device, tensors of one dtype, no transform of torch.func) and
    otherwise goes the module's own way.
    """
    for module in model.modules():
        if "forward" in vars(module):
            continue  # patched before, by us or by someone with other plans
        if _is_rms_norm(module):
            module.forward = types.MethodType(_rms_norm, module)
        elif _is_gated(module):
            module.forward = types.MethodType(_gated_block, module)


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or getattr(module, "bias", None) is not None or _eps(module) is None:
        return False
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not _takes(weight):
        return False
    return _agrees(module, lambda x: reference.rms_norm(x.double(), weight.double(), _eps(module)), weight)


def _is_gated(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not all(isinstance(part, nn.Module) for part in parts) or len(inspect.signature(module.forward).parameters) != 1:
        return False
    gate, up, down, _ = parts
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not _takes(weight):
        return False
    if getattr(gate, "in_features", None) != weight.shape[1]:  # quantised, and packed
        return False
    return _agrees(module, lambda x: down(reference.gated(gate(x), up(x)).to(x.dtype)), weight)


@torch.no_grad()
def _agrees(module: nn.Module, expected, weight: Tensor) -> bool:
    """Whether the module computes what is expected, within rounding, on numbers as wide as its weight."""
    x = torch.linspace(-3, 4, 2 * weight.shape[-1]).view(2, -1).to(weight.device, weight.dtype)
    truth = expected(x).double()
    return (module(x).double() - truth).abs().max() <= 8 * torch.finfo(weight.dtype).eps * truth.abs().max() + 1e-7


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    weight = self.weight  # may be another one for the call: the Fisher information gives each token its own
    if not _applies(x, weight) or weight.shape != x.shape[-1:]:
        return type(self).forward(self, x)
    if _on_gpu(x):
        return rms_norm(x, weight.shape, weight, _eps(self)).to(x.dtype)  # autocast's is float32
    return _RmsNorm.apply(x, weight, _eps(self))


def _gated_block(self: nn.Module, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not _applies(gate, up):
        return self.down_proj(self.act_fn(gate) * up)
    return self.down_proj(_Gated.apply(gate, up))


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _takes(*tensors: Tensor) -> bool:
    """Whether all are plain numbers on a GPU, or can be read by the native module, where that is new enough."""
    if all(map(_on_gpu, tensors)):
        return all(t.dtype in FLOATS and type(t) in ORDINARY for t in tensors)
    return not (cpu.why_not(*tensors) or cpu.why_no_kernel("rms_norm"))


def _applies(x: Tensor, other: Tensor) -> bool:
    """On one device and of one dtype; under vmap and its like tensors have no address."""
    return _takes(x, other) and x.dtype == other.dtype and not torch._C._are_functorch_transforms_active()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x, weight = x.contiguous(), weight.contiguous()
        scale = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return _norm_pass(x, weight, scale, None, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = _norm_pass(x, weight, scale, grad.contiguous(), ctx.eps)
        if ctx.needs_input_grad[1]:
            d_weight = (grad * (x * scale.unsqueeze(-1))).flatten(0, -2).sum(0).to(weight.dtype)
        return d_x, d_weight, None


def _norm_pass(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor | None, eps: float) -> Tensor:
    out, shape = torch.empty_like(x), (scale.numel(), weight.numel())
    addresses = [0 if t is None else t.data_ptr() for t in (x, weight, scale, grad, out)]
    cpu.run("rms_norm", cpu.dtype_code(x.dtype), *shape, eps, *addresses)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        if _on_gpu(gate):
            return silu(gate).mul_(up)
        out = torch.empty_like(gate)
        _gated_pass(gate, up, out, None, None, None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if _on_gpu(gate):
            return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _gated_pass(gate, up, None, grad.contiguous(), d_gate, d_up)
        return d_gate, d_up


def _gated_pass(gate: Tensor, *others: Tensor | None) -> None:
    addresses = [0 if t is None else t.data_ptr() for t in (gate, *others)]
    cpu.run("gated", cpu.dtype_code(gate.dtype), gate.numel(), *addresses)
