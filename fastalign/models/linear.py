"""Linear layers that add a LoRA adapter before the result is rounded, and that use the faster product of a CPU.

**The adapter is summed before rounding.** peft computes `result + lora_B(lora_A(x)) * scaling`. In 16 bits `result` has
been rounded before the adapter is added. What the adapter adds is lost wherever it is smaller than half a unit in the
last place of `result`. It is lost at every step, because rounding does not average out. So a young adapter, which adds
little, has hardly any effect and learns late. The sum also takes three more passes over the layer's output in forward,
and three in backward. Here the adapter's product is accumulated into the layer's product in float32, and the sum is
rounded once.

**Which product is used.** Adapter factors are float32; where products are in 16 bits they are rounded to 16 bits first,
as autocast does.

- CPU with instructions for the dtype: one product in 16 bits, `[x, x A'] [W, s B]'`.
- CPU without them: 16-bit products would be several times slower than float32 ones. Operands are widened to float32.
- float32 on an AMD CPU with AVX-512: oneDNN's product. torch multiplies float32 with MKL, which does not use AVX-512 on
  AMD processors, where oneDNN is twice as fast.
- GPU, 16 bits: `x W'` is added onto `(x A') (s B)'`. This copies no weight and takes half as many kernel launches, on
  which small models wait.

**Quantised weights** (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) are dequantised for each product, in forward and
again in backward, and take the same product after that. So a quantised layer computes bit for bit what a layer with the
dequantised weight does, and its adapter is summed before rounding too. bitsandbytes rounds first, and peft adds.
"""

from __future__ import annotations

import functools
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastalign.models.adapters import fusible_lora, is_disabled, lora_base
from fastalign.models.quantization import QuantizedWeight, is_quantized_layer, quantized_weight, training_product

HALF_DTYPES = (torch.bfloat16, torch.float16)
# Subclasses of Tensor may be sharded or quantised: only torch's own functions know how to multiply those.
PLAIN_TENSORS = (Tensor, nn.Parameter)


def speed_up_linear(model: nn.Module) -> None:
    """Lets linear layers, quantised or not, and LoRA on them use the products above; the model is changed in place.

    Each call of a layer decides anew whether such a product applies, and otherwise runs the layer's original forward.
    A LoRA layer qualifies with one active adapter on a frozen layer, without dropout, bias, variant or hooks; on a GPU
    in 16 bits only. Results are the same up to rounding, and are rounded less often.
    """
    for module in model.modules():
        if is_quantized_layer(module):  # `use_training_product` may have patched it, for calls without a fused product
            module.forward = functools.partial(_quantized_linear, module)
        elif "forward" in vars(module):
            continue  # already patched
        elif type(module) is nn.Linear:
            module.forward = functools.partial(_linear, module)
        elif (base := lora_base(module)) is not None and (type(base) is nn.Linear or is_quantized_layer(base)):
            module.forward = functools.partial(_lora_linear, module)


def limit_onednn_cache() -> None:
    """Limits oneDNN's cache to 64 compiled products, unless the environment sets a limit. Call it before the first one.

    The default is 1024 products of a third of a megabyte each, one per shape. Packed rows have a new length every step,
    so a cached product is reused only within that step.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


@cache
def has_native_matmul(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of this dtype."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype not in HALF_DTYPES


@cache
def _onednn_for_float32() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL on this CPU, and torch was built with it."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    faster = has.get("avx512_f", False) and has.get("cpu_name", "").startswith("AMD")
    return faster and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight' + bias` by whichever library is faster, without a gradient."""
    by_onednn = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and _onednn_for_float32()
    if by_onednn and x.numel():  # with zero rows or columns oneDNN leaves the output uninitialised
        bias = None if bias is None else bias.contiguous()  # oneDNN ignores the stride of a bias
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return linear(x, weight, bias)


def _product_dtype(x: Tensor, weight: Tensor | QuantizedWeight) -> torch.dtype | None:
    """The dtype of the layer's product.

    - A quantised layer multiplies in a dtype of its own, whatever autocast says. None where that would round the input.
    - torch's product has the dtype of autocast, which leaves float64 alone, or that of the tensors.
    """
    if isinstance(weight, QuantizedWeight):
        dtype = weight.dtype or x.dtype
        return dtype if torch.promote_types(x.dtype, dtype) == dtype != torch.float64 else None
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype if weight.dtype in HALF_DTYPES else x.dtype


def _is_plain(x: Tensor, weight: Tensor | QuantizedWeight) -> bool:
    """Whether both are plain tensors on one CPU or GPU, and no transform of torch.func (vmap, grad, ...) is active.

    Packed weights count as plain.
    """
    plain = type(x) in PLAIN_TENSORS and type(weight) in (*PLAIN_TENSORS, QuantizedWeight)
    on_one_device = x.device.type == weight.device.type in ("cpu", "cuda")
    return plain and on_one_device and not torch._C._are_functorch_transforms_active()


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    """The forward of `nn.Linear` where torch's product is not the fastest one."""
    if not _is_plain(x, self.weight) or x.is_cuda:
        return type(self).forward(self, x)
    dtype = _product_dtype(x, self.weight)
    if dtype is None or not _has_faster_product(dtype, x.dtype, self.weight.dtype):
        return type(self).forward(self, x)
    return _cpu_product(x, self.weight, self.bias, None, None, 0.0, dtype)


def _quantized_linear(self: Any, x: Tensor) -> Tensor:
    """The forward of a layer of bitsandbytes on a CPU: the product of the dequantised weight, as `_lora_linear` has it.

    So a model whose adapters are switched off has the bits of one whose adapters are zero.
    """
    weight = quantized_weight(self)
    dtype = None if weight is None or x.is_cuda or not _is_plain(x, weight) else _product_dtype(x, weight)
    if dtype is None:
        return training_product(self, x)
    return _cpu_product(x, weight, self.bias, None, None, 0.0, dtype).to(x.dtype)


def _has_faster_product(result: torch.dtype, *inputs: torch.dtype) -> bool:
    """Whether the CPU has a faster product of these dtypes than torch's."""
    float32 = all(dtype == result == torch.float32 for dtype in inputs)
    return not has_native_matmul(result) or (float32 and _onednn_for_float32())


def _lora_linear(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of peft's LoRA layer, as one fused product where that computes the same."""
    lora = None if args or kwargs else fusible_lora(self)
    if lora is None or lora.a.dtype in HALF_DTYPES:
        return type(self).forward(self, x, *args, **kwargs)
    weight = quantized_weight(lora.base) if is_quantized_layer(lora.base) else lora.base.weight
    dtype = None if weight is None or not _is_plain(x, weight) else _product_dtype(x, weight)
    if weight is None or dtype is None:
        return type(self).forward(self, x)
    bias, b = lora.base.bias, lora.b
    if x.is_cuda and not _is_fast_on_gpu(weight, dtype, rank=lora.a.shape[0]):
        return type(self).forward(self, x)
    if is_disabled(self):
        # With the adapter off, the result must be bit-identical to the policy with B = 0. We run the fused kernel with
        # B = 0, except where peft's forward is known to give the same bits:
        # - the adapter has dropout: then the policy, while it is trained, does not take the fused product either;
        # - on a CPU, the layer's and the adapter's product are computed separately, or they are one product whose bits
        #   do not change when columns of zeros are appended.
        same_bits = lora.dropout > 0 or (not x.is_cuda and (not _fuses_adapter(dtype) or _zeros_keep_bits()))
        if same_bits:
            return type(self).forward(self, x)
        b = torch.zeros_like(b)
    if x.is_cuda:
        return LoraLinearGpu.apply(x, weight, bias, lora.a, b, lora.scaling)
    out = _cpu_product(x, weight, bias, lora.a, b, lora.scaling, dtype)
    return out.to(x.dtype) if isinstance(weight, QuantizedWeight) else out


def _is_fast_on_gpu(weight: Tensor | QuantizedWeight, dtype: torch.dtype, rank: int) -> bool:
    """Whether a GPU's fast products apply: 16-bit weights, and rows that begin at multiples of 16 bytes."""
    same = weight.dtype in (dtype, None)  # None: that of the input
    return same and dtype in HALF_DTYPES and rank % 8 == weight.shape[0] % 8 == weight.shape[1] % 8 == 0


def _fuses_adapter(dtype: torch.dtype) -> bool:
    """Whether the CPU computes a result in `dtype`, and an adapter's part of it, by one product in 16 bits."""
    return dtype in HALF_DTYPES and has_native_matmul(dtype)


@cache
def _zeros_keep_bits() -> bool:
    """Whether appending columns of zeros leaves the bits of a CPU's product alone.

    It does where sums run through the columns in order. AMX sums in tiles instead.
    """
    return not torch.cpu._is_amx_tile_supported()


def _operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` as it enters a product with a result in `dtype`: in that dtype if the CPU multiplies it, else widened."""
    if _fuses_adapter(dtype):
        return t.to(dtype)
    return t.float() if t.dtype in HALF_DTYPES else t


def _weight_operand(weight: Any, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) as `_operand`, dequantised where it is packed."""
    return _operand(_in_dtype(weight, dtype), dtype)


def _split(weight: Any) -> tuple[QuantizedWeight | None, Tensor | None]:
    """The weight as a backward pass keeps it: autograd takes tensors only."""
    return (weight, None) if isinstance(weight, QuantizedWeight) else (None, weight)


class LoraLinearCpu(torch.autograd.Function):
    """`x W' + bias + s (x A') B'` on a CPU, accumulated once and rounded once; without an adapter `x W' + bias`.

    Plain `nn.Linear` layers use it too, with a = b = None.

    Arguments: x (..., in), weight (out, in), which may be a QuantizedWeight, bias (out,) or None, a (r, in) and b
    (out, r) or both None (no adapter), the scaling s, and the dtype of the result (..., out).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, dtype):
        """The result, (..., out)."""
        rows, w = _operand(_as_rows(x), dtype), _weight_operand(weight, dtype)  # (T, in), (out, in)
        bias_ = None if bias is None else _operand(bias, dtype)
        xa: Any = None
        with torch.autocast(x.device.type, enabled=False):
            if a is not None:
                xa = _linear_product(rows, _operand(a, dtype))  # (T, r)
            if a is None:
                out = _linear_product(rows, w, bias_)  # (T, out)
            elif _fuses_adapter(dtype):  # (T, in + r) x (out, in + r)'
                out = linear(torch.cat([rows, xa], 1), torch.cat([w, _operand(b * scaling, dtype)], 1), bias_)
            else:
                out = _linear_product(rows, w, bias_).addmm_(xa, _operand(b, dtype).t(), alpha=scaling)
        _, of_weight, _, of_a, of_b, *_ = ctx.needs_input_grad
        # The input is saved once, in its original dtype, and only if a gradient needs it.
        ctx.quantized, weight_ = _split(weight)
        ctx.save_for_backward(x if of_weight or of_a or of_b else None, weight_, a, b, xa if of_b else None)
        ctx.scaling, ctx.dtype, ctx.x, ctx.has_adapter = scaling, dtype, (x.shape, x.dtype), a is not None
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.to(dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        """The gradients of what `forward` was given."""
        x, weight, a, b, xa = ctx.saved_tensors
        # With gradients enabled somebody wants a second derivative: then use products that have one, of the inputs.
        twice = torch.is_grad_enabled()
        product = linear if twice else _linear_product
        of_x, of_weight, of_bias, of_a, of_b, *_ = ctx.needs_input_grad
        d_weight = d_bias = d_a = d_b = None
        d_x: Any = None
        with torch.autocast(grad.device.type, enabled=False):
            g = _operand(_as_rows(grad), ctx.dtype)  # (T, out)
            w: Any = _weight_operand(ctx.quantized or weight, ctx.dtype) if of_x else None  # (out, in)
            rows: Any = None if x is None else _operand(_as_rows(x), ctx.dtype)  # (T, in)
            # The gradient of x A', (T, r).
            ga: Any = (
                product(g, _operand(b * ctx.scaling, ctx.dtype).t()) if ctx.has_adapter and (of_x or of_a) else None
            )
            if of_x and not ctx.has_adapter:
                d_x = product(g, w.t())
            elif of_x and _fuses_adapter(ctx.dtype):
                d_x = torch.mm(torch.cat([g, ga], 1), torch.cat([w, _operand(a, ctx.dtype)]))
            elif of_x:
                d_x = product(g, w.t()).addmm_(ga, _operand(a, ctx.dtype))
            if of_x:
                d_x = d_x.view(ctx.x[0]).to(ctx.x[1])
            if of_weight:
                d_weight = product(g.t(), rows.t()).to(weight.dtype)
            if of_bias:
                d_bias = g.sum(0).to(ctx.bias_dtype)
            if of_a:
                d_a = product(ga.t(), rows.t()).to(a.dtype)
            if of_b:
                xa = product(rows, _operand(a, ctx.dtype)) if twice else xa
                d_b = product(xa.t(), g.t()).t().to(b.dtype).mul_(ctx.scaling)  # (r, out)' is twice as fast as (out, r)
        return d_x, d_weight, d_bias, d_a, d_b, None, None


def _cpu_product(*arguments: Any) -> Tensor:
    """`LoraLinearCpu`, which a compiler calls as it is: what it would make of the branches inside gets no faster."""
    return _uncompiled(*arguments) if torch.compiler.is_compiling() else LoraLinearCpu.apply(*arguments)


@torch.compiler.disable
def _uncompiled(*arguments: Any) -> Tensor:
    return LoraLinearCpu.apply(*arguments)


class LoraLinearGpu(torch.autograd.Function):
    """`(x A') (s B)' + x W' + bias` on a GPU in the 16-bit dtype of W. The sum is rounded once, with a bias twice.

    Arguments: x (..., in), weight (out, in), which may be a QuantizedWeight, bias (out,) or None, a (r, in), b (out,
    r), and the scaling s; the result is (..., out). The weight gets no gradient.

    We compute 2 * (adapter), then ask cuBLAS for 0.5 * that + x W'. The number is the same, since doubling and halving
    are exact, but cuBLAS then adds in float32. With a factor of 1 instead of 0.5, cuBLAS on an H200 rounds x W' to 16
    bits first (its kernels are named "badd"), and the adapter is lost as it is with peft. The factors A and 2 s B in 16
    bits are saved for the backward pass; they are small.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        """The result, (..., out)."""
        dtype = weight.dtype or x.dtype
        rows, a16 = _as_rows(x).to(dtype), a.to(dtype)
        b16 = torch.mul(b, 2 * scaling, out=torch.empty_like(b, dtype=dtype))
        xa = torch.mm(rows, a16.t())  # (T, r)
        out = torch.mm(xa, b16.t()).addmm_(rows, _in_dtype(weight, dtype).t(), beta=0.5)  # (T, out)
        if bias is not None:
            out += bias
        of_a, of_b = ctx.needs_input_grad[3:5]
        ctx.quantized, weight_ = _split(weight)
        ctx.save_for_backward(x if of_a or of_b else None, weight_, a, b, a16, b16, xa if of_b else None)
        ctx.scaling, ctx.x = scaling, (x.shape, x.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        """The gradients of what `forward` was given."""
        x, weight, a, b, a16, b16, xa = ctx.saved_tensors
        of_x, _, of_bias, of_a, of_b, _ = ctx.needs_input_grad
        g, d_x, d_bias, d_a, d_b = _as_rows(grad), None, None, None, None  # (T, out)
        dtype = a16.dtype
        rows: Any = None if x is None else _as_rows(x).to(dtype)  # (T, in)
        if torch.is_grad_enabled():  # a second derivative is wanted: compute from the factors, not from kept copies
            a16, b16 = a.to(dtype), (b * (2 * ctx.scaling)).to(dtype)
            xa = None if rows is None else torch.mm(rows, a16.t())
        ga: Any = torch.mm(g, b16) if of_x or of_a else None  # (T, r), twice the gradient of x A'
        if of_x:
            w = _in_dtype(ctx.quantized or weight, dtype)
            d_x = torch.mm(ga, a16).addmm_(g, w, beta=0.5).view(ctx.x[0]).to(ctx.x[1])
        if of_bias:
            d_bias = g.sum(0).to(ctx.bias_dtype)
        if of_a:
            d_a = _factor_gradient(a, ga.t(), rows, 0.5)
        if of_b:
            d_b = _factor_gradient(b, g.t(), xa, ctx.scaling)
        return d_x, None, d_bias, d_a, d_b, None


def _in_dtype(weight: Any, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight


def _factor_gradient(factor: Tensor, left: Tensor, right: Any, scaling: float) -> Tensor:
    """The gradient `scaling * left right` of an adapter's factor, in its dtype.

    On a GPU bfloat16 operands give a float32 result in one launch, without rounding to 16 bits in between. float16 is
    left out because it has modes that refuse `out_dtype`.
    """
    wide = factor.dtype == torch.float32 and left.dtype == torch.bfloat16
    if left.is_cuda and wide and not (torch.version.hip or torch.is_grad_enabled()):
        return torch.addmm(factor, left, right, out_dtype=torch.float32, beta=0, alpha=scaling)
    return torch.mm(left, right).to(factor.dtype).mul_(scaling)


def _as_rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
