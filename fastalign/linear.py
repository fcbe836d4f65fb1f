"""Linear layers on the CPU: adapters without temporaries, and 16-bit products where the CPU has none.

Two things cost a CPU more than they must. peft adds an adapter as `result + lora_B(lora_A(x)) * scaling`, three more
passes over the layer's output in forward and as many in backward: here the adapter's product accumulates into the
layer's. And a CPU without bfloat16 instructions multiplies 16-bit matrices several times slower than float32 ones: here
they are widened and multiplied in float32, and only the result is rounded. With such instructions everything is
multiplied in bfloat16, an adapter's float32 factors rounded for it as autocast does.
"""

from __future__ import annotations

import types
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

LOW = (torch.bfloat16, torch.float16)


def speed_up_linear(model: nn.Module) -> None:
    """Lets the model's `nn.Linear` and plain LoRA layers take the ways above where they apply; changed in place.

    Each call looks whether they do (on the CPU; LoRA: one active adapter on a frozen, unquantised layer, without
    dropout, bias or variant) and otherwise goes the layer's own way. Results are the same up to rounding, which is
    less where products are taken in float32: there an adapter is never rounded to 16 bits, nor is its sum with the
    layer's product before the end.
    """
    for module in model.modules():
        if "forward" in vars(module):
            continue  # patched before, by us or by someone with other plans
        if type(module) is nn.Linear:
            module.forward = types.MethodType(_linear, module)
        elif _is_lora(module):
            module.forward = types.MethodType(_lora_linear, module)


def _is_lora(module: nn.Module) -> bool:
    """peft's LoRA around a plain linear layer; told by its parts, since peft need not be imported to use fastalign."""
    base = getattr(module, "base_layer", None)
    return type(base) is nn.Linear and hasattr(module, "lora_A") and hasattr(module, "lora_variant")


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of this dtype."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype not in LOW


def _result_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of torch's own product: autocast's, or the tensors'."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return weight.dtype if weight.dtype in LOW else x.dtype


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    dtype = _result_dtype(x, self.weight)
    if multiplies(dtype) or not x.device.type == self.weight.device.type == "cpu":
        return type(self).forward(self, x)
    return _Product.apply(x, self.weight, self.bias, None, None, 0.0, dtype)


def _lora_linear(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    base, dtype = self.base_layer, _result_dtype(x, self.base_layer.weight)
    adapter = None if args or kwargs else _plain_adapter(self)
    on_cpu = x.device.type == base.weight.device.type == "cpu"
    if adapter is None or not on_cpu:
        return type(self).forward(self, x, *args, **kwargs)
    a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
    return _Product.apply(x, base.weight, base.bias, a, b, self.scaling[adapter], dtype)


def _plain_adapter(layer: nn.Module) -> str | None:
    """The one active adapter of a LoRA layer, if nothing but `s B A` is asked of it."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return None
    (name,) = active
    dropout = layer.lora_dropout[name]
    drops = layer.training and getattr(dropout, "p", 0.0) > 0
    odd = layer.lora_B[name].bias is not None or layer.base_layer.weight.requires_grad
    return None if drops or odd or layer.lora_A[name].weight.dtype in LOW else name


def _operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What enters a product of a result in `dtype`: that dtype where the CPU multiplies it, else float32 or float64."""
    if dtype in LOW and multiplies(dtype):
        return t.to(dtype)
    return t.float() if t.dtype in LOW else t


class _Product(torch.autograd.Function):
    """`x W' + bias + s (x A') B'` in one accumulator, then in `dtype`; A and B may be None."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, dtype):
        flat = x.reshape(-1, x.shape[-1])  # (T, in)
        wide = _operand(flat, dtype)
        with torch.autocast("cpu", enabled=False):
            out = linear(wide, _operand(weight, dtype), None if bias is None else _operand(bias, dtype))  # (T, out)
            xa = None if a is None else torch.mm(wide, _operand(a, dtype).t())  # (T, r)
            if a is not None:
                out.addmm_(xa, _operand(b, dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, a, b, xa)
        ctx.scaling, ctx.dtype, ctx.x = scaling, dtype, (x.shape, x.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.to(dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, weight, a, b, xa = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_weight = d_bias = d_a = d_b = d_x = None
        with torch.autocast("cpu", enabled=False):
            g = _operand(grad.reshape(-1, grad.shape[-1]), ctx.dtype)  # (T, out)
            wide = _operand(flat, ctx.dtype) if needs[1] or a is not None else None
            ga = None if a is None else torch.mm(g, _operand(b, ctx.dtype)).mul_(ctx.scaling)  # (T, r)
            if needs[0]:
                d_x = torch.mm(g, _operand(weight, ctx.dtype))
                if a is not None:
                    d_x.addmm_(ga, _operand(a, ctx.dtype))
                d_x = d_x.view(ctx.x[0]).to(ctx.x[1])
            if needs[1]:
                d_weight = torch.mm(g.t(), wide).to(weight.dtype)
            if needs[2]:
                d_bias = g.sum(0).to(ctx.bias_dtype)
            if a is not None:
                d_a, d_b = torch.mm(ga.t(), wide).to(a.dtype), torch.mm(g.t(), xa).to(b.dtype).mul_(ctx.scaling)
        return d_x, d_weight, d_bias, d_a, d_b, None, None
