"""Linear layers whose adapters round nothing away and leave no temporaries; the faster product where a CPU has two.

peft adds an adapter as `result + lora_B(lora_A(x)) * scaling`. In 16 bits `result` has been rounded by then, and all
of an adapter below half a unit in the last place of it is lost, always and not on average: a young adapter has hardly
any effect, and learns late. It also takes three more passes over the layer's output in forward and as many in backward.
Here the adapter's product accumulates into the layer's, and the sum is rounded once.

A CPU without bfloat16 instructions multiplies 16-bit matrices several times slower than float32 ones: there they are
widened and multiplied in float32. Otherwise everything is multiplied in 16 bits, an adapter's float32 factors rounded
for it as autocast does: `[x, x A'] [W, s B]'`, one product.

float32 is multiplied by MKL in torch, which leaves AVX-512 alone on AMD's processors: there oneDNN's product, which
torch has too, is 2.2 times as fast.
"""

from __future__ import annotations

import os
import types
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

LOW = (torch.bfloat16, torch.float16)


def speed_up_linear(model: nn.Module) -> None:
    """Lets the model's `nn.Linear` and plain LoRA layers take the ways above where they apply; changed in place.

    Each call looks whether they do (LoRA: one active adapter on a frozen, unquantised layer, without dropout, bias or
    variant; on a GPU in 16 bits alone) and otherwise goes the layer's own way. Results are the same up to rounding,
    of which there is less.
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


def keep_few_primitives() -> None:
    """Lets oneDNN keep 64 compiled products, where the environment does not say how many; before it is first used.

    It keeps 1024, a third of a megabyte each, one for each shape it meets, and packed rows are of another length at
    each step: nothing is found again but what the layers of one step share.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of this dtype."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype not in LOW


@cache
def _onednn_for_float32() -> bool:
    """Whether this is a CPU on which oneDNN multiplies float32 faster than MKL, and torch was built with it."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    faster = has.get("avx512_f", False) and has.get("cpu_name", "").startswith("AMD")
    return faster and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight' + bias` by whichever library is faster, without a gradient."""
    if x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and _onednn_for_float32():
        bias = None if bias is None else bias.contiguous()  # its stride would not be looked at
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return linear(x, weight, bias)


def _result_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of torch's own product: autocast's, or the tensors'."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype if weight.dtype in LOW else x.dtype


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    dtype = _result_dtype(x, self.weight)
    if not x.device.type == self.weight.device.type == "cpu" or not _is_slow(dtype, x.dtype, self.weight.dtype):
        return type(self).forward(self, x)
    return _Product.apply(x, self.weight, self.bias, None, None, 0.0, dtype)


def _is_slow(result: torch.dtype, *inputs: torch.dtype) -> bool:
    """Whether torch's own product of these is not the fastest that the CPU can do."""
    if not multiplies(result):
        return True
    plain = all(dtype == result == torch.float32 for dtype in inputs)
    return plain and _onednn_for_float32() and not torch._C._are_functorch_transforms_active()


def _lora_linear(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    base, dtype = self.base_layer, _result_dtype(x, self.base_layer.weight)
    adapter = None if args or kwargs else _plain_adapter(self)
    if adapter is None or not _applies(x, base.weight, dtype, self.r[adapter]):
        return type(self).forward(self, x, *args, **kwargs)
    a, b, scaling = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter]
    if self.disable_adapters:
        if not _joins(x, dtype) or _zeros_keep_bits(x.device.type):
            return type(self).forward(self, x)
        b = torch.zeros_like(b)  # the reference takes the policy's product, for its bits
    return _Product.apply(x, base.weight, base.bias, a, b, scaling, dtype)


def _plain_adapter(layer: nn.Module) -> str | None:
    """The one active adapter of a LoRA layer, if nothing but `s B A` is asked of it."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.merged or active[0] in layer.lora_variant:
        return None
    (name,) = active
    dropout = layer.lora_dropout[name]
    drops = layer.training and getattr(dropout, "p", 0.0) > 0
    odd = layer.lora_B[name].bias is not None or layer.base_layer.weight.requires_grad
    return None if drops or odd or layer.lora_A[name].weight.dtype in LOW else name


def _applies(x: Tensor, weight: Tensor, dtype: torch.dtype, rank: int) -> bool:
    """On a GPU: 16-bit weights, and rows that begin at multiples of 16 bytes, which its fast products need."""
    if x.is_cuda and weight.is_cuda:
        return weight.dtype == dtype in LOW and rank % 8 == weight.shape[0] % 8 == weight.shape[1] % 8 == 0
    return x.device.type == weight.device.type == "cpu"


def _joins(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of a result in `dtype` are taken in it, and so an adapter's in one with its layer's."""
    return dtype in LOW and (t.is_cuda or multiplies(dtype))


@cache
def _zeros_keep_bits(device: str) -> bool:
    """Whether more columns of zeros leave a product's bits alone: where sums go through the columns in order."""
    return device == "cpu" and not torch.cpu._is_amx_tile_supported()


def _operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What enters a product of a result in `dtype`: that dtype where it is multiplied, else float32 or float64."""
    if _joins(t, dtype):
        return t.to(dtype)
    return t.float() if t.dtype in LOW else t


class _Product(torch.autograd.Function):
    """`x W' + bias + s (x A') B'` in one accumulator, then in `dtype`; A and B may be None."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, dtype):
        flat = x.reshape(-1, x.shape[-1])  # (T, in)
        wide, w, bias_ = (None if t is None else _operand(t, dtype) for t in (flat, weight, bias))
        with torch.autocast(x.device.type, enabled=False):
            xa = None if a is None else _linear_product(wide, _operand(a, dtype))  # (T, r)
            if a is None:
                out = _linear_product(wide, w, bias_)  # (T, out)
            elif _joins(x, dtype):
                out = linear(torch.cat([wide, xa], 1), torch.cat([w, _operand(b * scaling, dtype)], 1), bias_)
            else:
                out = _linear_product(wide, w, bias_).addmm_(xa, _operand(b, dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, a, b, xa)
        ctx.scaling, ctx.dtype, ctx.x = scaling, dtype, (x.shape, x.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.to(dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, weight, a, b, xa = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_weight = d_bias = d_a = d_b = d_x = None
        with torch.autocast(grad.device.type, enabled=False):
            g, w = _operand(grad.reshape(-1, grad.shape[-1]), ctx.dtype), _operand(weight, ctx.dtype)  # (T, out)
            wide = _operand(flat, ctx.dtype) if needs[1] or a is not None else None
            ga = None if a is None else _linear_product(g, _operand(b * ctx.scaling, ctx.dtype).t())  # (T, r)
            if needs[0] and a is None:
                d_x = _linear_product(g, w.t())
            elif needs[0] and _joins(g, ctx.dtype):
                d_x = torch.mm(torch.cat([g, ga], 1), torch.cat([w, _operand(a, ctx.dtype)]))
            elif needs[0]:
                d_x = _linear_product(g, w.t()).addmm_(ga, _operand(a, ctx.dtype))
            if needs[0]:
                d_x = d_x.view(ctx.x[0]).to(ctx.x[1])
            if needs[1]:
                d_weight = _linear_product(g.t(), wide.t()).to(weight.dtype)
            if needs[2]:
                d_bias = g.sum(0).to(ctx.bias_dtype)
            if a is not None:
                d_a = _linear_product(ga.t(), wide.t()).to(a.dtype)
                d_b = _linear_product(xa.t(), g.t()).t().to(b.dtype).mul_(ctx.scaling)  # few rows: twice as fast
        return d_x, d_weight, d_bias, d_a, d_b, None, None
