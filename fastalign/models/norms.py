"""Finds the RMSNorms and SwiGLU blocks of a model's body, and lets them run the ops of `fastalign.ops`.

Those take fewer passes than the modules' code, and save less for the backward pass: `ops/rms_norm.py` and
`ops/swiglu.py` say how.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import reference
from fastalign.models.adapters import is_hooked, lora_base
from fastalign.models.linear import PLAIN_TENSORS
from fastalign.models.quantization import is_quantized_layer, quantized_weight
from fastalign.ops import rms_norm, swiglu
from fastalign.ops.backends import cpu

_RMS_NORM, _SWIGLU = "rms_norm", "gated"  # the kernels of the native module
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def speed_up_body(model: nn.Module) -> None:
    """Let the model's RMSNorms and SwiGLU blocks run the ops where those apply; the modules are changed in place.

    A module is recognised by its parts, and by computing the same as `reference.rms_norm` or `reference.swiglu` on a
    few numbers. Each call checks whether the op applies: tensors on one device, of one dtype, outside of torch.func's
    transforms. Otherwise the module's own code runs.
    """
    for module in model.modules():
        if "forward" in vars(module):
            continue  # already patched
        if _is_rms_norm(module):
            module.forward = functools.partial(_rms_norm, module)
        elif _is_swiglu(module):
            module.forward = functools.partial(_swiglu_block, module)


def _is_rms_norm(module: nn.Module) -> bool:
    weight, eps = getattr(module, "weight", None), _eps(module)
    if "RMSNorm" not in type(module).__name__ or getattr(module, "bias", None) is not None or eps is None:
        return False
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not _takes(_RMS_NORM, weight):
        return False
    wide = weight.double()
    return _agrees(module, lambda x: reference.rms_norm(x.double(), wide, eps), weight)


def _is_swiglu(module: nn.Module) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not all(isinstance(part, nn.Module) for part in parts):
        return False
    gate, up, down, _ = parts
    if len(inspect.signature(module.forward).parameters) != 1 or (row := _input_row(gate)) is None:
        return False
    return _agrees(module, lambda x: down(reference.swiglu(gate(x), up(x)).to(x.dtype)), row)


def _input_row(layer: Any) -> Tensor | None:
    """A tensor (in,) of the dtype and on the device that a linear layer's input has; None if the op cannot take it."""
    base: Any = lora_base(layer) or layer
    weight = getattr(base, "weight", None)
    if is_quantized_layer(base):
        packed = quantized_weight(base)
        row = None if packed is None else torch.empty(base.in_features, dtype=packed.dtype, device=packed.device)
    else:
        row = weight[0] if isinstance(weight, Tensor) and weight.dim() == 2 and _takes(_SWIGLU, weight) else None
    if row is None or row.shape != (getattr(base, "in_features", None),) or not _takes(_SWIGLU, row):
        return None
    return row


@torch.no_grad()
def _agrees(module: nn.Module, expected: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    """Whether the module computes what is expected, within rounding, on numbers as wide as its weight."""
    x = torch.linspace(-3, 4, 2 * weight.shape[-1]).view(2, -1).to(weight.device, weight.dtype)
    truth = expected(x).double()
    budget = 8 * torch.finfo(weight.dtype).eps * truth.abs().max() + 1e-7
    return bool((module(x).double() - truth).abs().max() <= budget)


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


# The forward methods of patched modules. `self` has the parts that were looked for above.


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    weight = self.weight  # may be replaced for the call: the Fisher information gives each token its own weight
    if not _applies(_RMS_NORM, x, weight) or weight.shape != x.shape[-1:]:
        return type(self).forward(self, x)
    return rms_norm(x, weight, _eps(self) or 0.0)


def _swiglu_block(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not _applies(_SWIGLU, gate, up) or is_hooked(self.act_fn):  # the op would not call what the hook waits for
        return self.down_proj(self.act_fn(gate) * up)
    return self.down_proj(swiglu(gate, up))


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _takes(kernel: str, *tensors: Tensor) -> bool:
    """Whether all are ordinary floating tensors on a GPU, or this kernel of the native module can read them."""
    if all(map(_on_gpu, tensors)):
        return all(t.dtype in FLOATS and type(t) in PLAIN_TENSORS for t in tensors)
    return not (cpu.why_not(*tensors) or cpu.why_no_kernel(kernel))


def _applies(kernel: str, x: Tensor, other: Tensor) -> bool:
    """Whether both are on one device and of one dtype, and have an address, as under vmap they have not."""
    return _takes(kernel, x, other) and x.dtype == other.dtype and not torch._C._are_functorch_transforms_active()
