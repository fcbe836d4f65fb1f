"""Linear layers whose adapters round nothing away and leave no temporaries; the faster product where a CPU has two.

peft adds an adapter as `result + lora_B(lora_A(x)) * scaling`. In 16 bits `result` has been rounded by then, and all
of an adapter below half a unit in the last place of it is lost, always and not on average: a young adapter has hardly
any effect, and learns late. It also takes three more passes over the layer's output in forward and as many in backward.
Here the adapter's product accumulates into the layer's, and the sum is rounded once.

A CPU without bfloat16 instructions multiplies 16-bit matrices several times slower than float32 ones: there they are
widened and multiplied in float32. Otherwise everything is multiplied in 16 bits, an adapter's float32 factors rounded
for it as autocast does: on a CPU `[x, x A'] [W, s B]'`, one product; on a GPU `x W'` onto `(x A') (s B)'`, which copies
no weight and launches half as much: small models wait for launches there.

float32 is multiplied by MKL in torch, which leaves AVX-512 alone on AMD's processors: there oneDNN's product, which
torch has too, is twice as fast.
"""

from __future__ import annotations

import os
import types
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

LOW = (torch.bfloat16, torch.float16)
ORDINARY = (Tensor, nn.Parameter)


def speed_up_linear(model: nn.Module) -> None:
    """Lets the model's `nn.Linear` and plain LoRA layers take the ways above where they apply; changed in place.

    Each call looks whether they do (LoRA: one active adapter on a frozen, unquantised layer, without dropout, bias,
    variant or hooks; on a GPU in 16 bits alone) and otherwise goes the layer's own way. Results are the same up to
    rounding, of which there is less.
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
def has_native_matmul(dtype: torch.dtype) -> bool:
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
    by_onednn = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and _onednn_for_float32()
    if by_onednn and x.numel():  # of no terms its sums are not zeros, but what lay there
        bias = None if bias is None else bias.contiguous()  # its stride would not be looked at
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return linear(x, weight, bias)


def _result_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of torch's own product: autocast's, which leaves float64 alone, or the tensors'."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype if weight.dtype in LOW else x.dtype


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether both are ordinary tensors of one CPU or GPU: subclasses and functorch know torch's own products alone."""
    ordinary = type(x) in ORDINARY and type(weight) in ORDINARY and not torch._C._are_functorch_transforms_active()
    return ordinary and x.device.type == weight.device.type in ("cpu", "cuda")


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    if not _is_plain(x, self.weight) or x.is_cuda:
        return type(self).forward(self, x)
    dtype = _result_dtype(x, self.weight)
    if not _is_slow(dtype, x.dtype, self.weight.dtype):
        return type(self).forward(self, x)
    return _Product.apply(x, self.weight, self.bias, None, None, 0.0, dtype)


def _is_slow(result: torch.dtype, *inputs: torch.dtype) -> bool:
    """Whether torch's own product of these is not the fastest that the CPU can do."""
    float32 = all(dtype == result == torch.float32 for dtype in inputs)
    return not has_native_matmul(result) or (float32 and _onednn_for_float32())


def _lora_linear(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    base = self.base_layer
    adapter = _plain_adapter(self) if _is_plain(x, base.weight) and not (args or kwargs) else None
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)
    dtype = _result_dtype(x, base.weight)
    if x.is_cuda and not _is_fast_on_gpu(base.weight, dtype, self.r[adapter]):
        return type(self).forward(self, x)
    a, b, scaling = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter]
    if self.disable_adapters:
        drops = getattr(self.lora_dropout[adapter], "p", 0.0) > 0  # then the policy goes peft's way while it is trained
        if drops or (not x.is_cuda and (not _joins(dtype) or _zeros_keep_bits())):
            return type(self).forward(self, x)
        b = torch.zeros_like(b)  # the reference takes the policy's product, for its bits
    if x.is_cuda:
        return _Added.apply(x, base.weight, base.bias, a, b, scaling)
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
    odd = odd or any(map(_is_hooked, (layer.base_layer, layer.lora_A[name], layer.lora_B[name])))
    return None if drops or odd or layer.lora_A[name].weight.dtype in LOW else name


def _is_hooked(module: nn.Module) -> bool:
    """Whether someone is to be told of the module's calls."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before or after or module._backward_pre_hooks or module._backward_hooks)


def _is_fast_on_gpu(weight: Tensor, dtype: torch.dtype, rank: int) -> bool:
    """16-bit weights, and rows that begin at multiples of 16 bytes, which its fast products need."""
    return weight.dtype == dtype in LOW and rank % 8 == weight.shape[0] % 8 == weight.shape[1] % 8 == 0


def _joins(dtype: torch.dtype) -> bool:
    """Whether the CPU takes products of a result in `dtype` in it, and so an adapter's in one with its layer's."""
    return dtype in LOW and has_native_matmul(dtype)


@cache
def _zeros_keep_bits() -> bool:
    """Whether more columns of zeros leave a CPU's product's bits alone: where sums go through the columns in order."""
    return not torch.cpu._is_amx_tile_supported()


def _operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What enters a product of a result in `dtype`: that dtype where it is multiplied, else float32 or float64."""
    if _joins(dtype):
        return t.to(dtype)
    return t.float() if t.dtype in LOW else t


class _Product(torch.autograd.Function):
    """`x W' + bias + s (x A') B'` in one accumulator, then in `dtype`; A and B may be None. Of a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, dtype):
        wide, w, bias_ = (None if t is None else _operand(t, dtype) for t in (_rows(x), weight, bias))
        with torch.autocast(x.device.type, enabled=False):
            xa = None if a is None else _linear_product(wide, _operand(a, dtype))  # (T, r)
            if a is None:
                out = _linear_product(wide, w, bias_)  # (T, out)
            elif _joins(dtype):
                out = linear(torch.cat([wide, xa], 1), torch.cat([w, _operand(b * scaling, dtype)], 1), bias_)
            else:
                out = _linear_product(wide, w, bias_).addmm_(xa, _operand(b, dtype).t(), alpha=scaling)
        _, of_weight, _, of_a, of_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight or of_a or of_b else None, weight, a, b, xa if of_b else None)
        ctx.scaling, ctx.dtype, ctx.x = scaling, dtype, (x.shape, x.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.to(dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, xa = ctx.saved_tensors
        again = torch.is_grad_enabled()  # a gradient of this gradient is wanted: by products that have one
        product = linear if again else _linear_product
        of_x, of_weight, of_bias, of_a, of_b, *_ = ctx.needs_input_grad
        d_weight = d_bias = d_a = d_b = d_x = None
        with torch.autocast(grad.device.type, enabled=False):
            g, w = _operand(_rows(grad), ctx.dtype), _operand(weight, ctx.dtype)  # (T, out)
            wide = None if x is None else _operand(_rows(x), ctx.dtype)
            ga = product(g, _operand(b * ctx.scaling, ctx.dtype).t()) if a is not None and (of_x or of_a) else None
            if of_x and a is None:
                d_x = product(g, w.t())
            elif of_x and _joins(ctx.dtype):
                d_x = torch.mm(torch.cat([g, ga], 1), torch.cat([w, _operand(a, ctx.dtype)]))
            elif of_x:
                d_x = product(g, w.t()).addmm_(ga, _operand(a, ctx.dtype))
            if of_x:
                d_x = d_x.view(ctx.x[0]).to(ctx.x[1])
            if of_weight:
                d_weight = product(g.t(), wide.t()).to(weight.dtype)
            if of_bias:
                d_bias = g.sum(0).to(ctx.bias_dtype)
            if of_a:
                d_a = product(ga.t(), wide.t()).to(a.dtype)
            if of_b:
                xa = product(wide, _operand(a, ctx.dtype)) if again else xa
                d_b = product(xa.t(), g.t()).t().to(b.dtype).mul_(ctx.scaling)  # few rows: twice as fast
        return d_x, d_weight, d_bias, d_a, d_b, None, None


class _Added(torch.autograd.Function):
    """`(x A') (s B)' + x W' + bias` in the dtype of W, 16 bits; the sum is rounded once, with a bias twice. Of a GPU.

    The layer's product is added onto the adapter's in its accumulator, where that is halved: made twice as large first,
    so nothing is rounded by it. Added onto what stays as it is, the product was rounded first, by cuBLAS on an H200
    (its kernels named "badd"), and the adapter lost as peft's is. What A and B are rounded to is kept: it is small.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        wide, a16 = _rows(x).to(weight.dtype), a.to(weight.dtype)
        b16 = torch.mul(b, 2 * scaling, out=torch.empty_like(b, dtype=weight.dtype))
        xa = torch.mm(wide, a16.t())  # (T, r)
        out = torch.mm(xa, b16.t()).addmm_(wide, weight.t(), beta=0.5)  # (T, out)
        if bias is not None:
            out += bias
        of_a, of_b = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(x if of_a or of_b else None, weight, a, b, a16, b16, xa if of_b else None)
        ctx.scaling, ctx.x = scaling, (x.shape, x.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, a16, b16, xa = ctx.saved_tensors
        of_x, _, of_bias, of_a, of_b, _ = ctx.needs_input_grad
        g, d_x, d_bias, d_a, d_b = _rows(grad), None, None, None, None  # (T, out)
        wide = None if x is None else _rows(x).to(weight.dtype)
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: of what the kept ones were made of
            a16, b16 = a.to(weight.dtype), (b * (2 * ctx.scaling)).to(weight.dtype)
            xa = None if wide is None else torch.mm(wide, a16.t())
        ga = torch.mm(g, b16) if of_x or of_a else None  # (T, r)
        if of_x:
            d_x = torch.mm(ga, a16).addmm_(g, weight, beta=0.5).view(ctx.x[0]).to(ctx.x[1])
        if of_bias:
            d_bias = g.sum(0).to(ctx.bias_dtype)
        if of_a:
            d_a = _of_factor(a, ga.t(), wide, 0.5)
        if of_b:
            d_b = _of_factor(b, g.t(), xa, ctx.scaling)
        return d_x, None, d_bias, d_a, d_b, None


def _of_factor(factor: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """The gradient `scaling left right` of an adapter's factor, in its dtype: on a GPU one launch, and not rounded."""
    wide = factor.dtype == torch.float32 and left.dtype == torch.bfloat16  # float16 has modes that refuse it
    if left.is_cuda and wide and not (torch.version.hip or torch.is_grad_enabled()):
        return torch.addmm(factor, left, right, out_dtype=torch.float32, beta=0, alpha=scaling)
    return torch.mm(left, right).to(factor.dtype).mul_(scaling)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
