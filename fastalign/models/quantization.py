"""Weights in 4 or 8 bits. The only module that imports bitsandbytes.

On a CPU, layers of bitsandbytes 0.50 take another product in evaluation mode than in training mode.
`use_training_product` lets them take the one of training always, since the other one is wrong for anything but
inference:

- A `Linear4bit` on a CPU with bfloat16 instructions rearranges its weights in place at its first call in evaluation
  mode. The product after that has no backward pass, so layers below it get no gradient from then on. The scales are
  rounded to bfloat16, and `dequantize_4bit` reads the weights in the wrong order. `state_dict` undoes the
  rearrangement, but not that of the scales, so a saved model is another one. The first loss does not show any of it,
  because policy and reference take the same product.
- A `Linear8bitLt` rounds its inputs to 8 bits in evaluation mode, and not in training mode. A reference that is scored
  in evaluation mode differs from its policy before the first step.

`QuantizedWeight` is what the products of `fastalign.models.linear` multiply by.
"""

from __future__ import annotations

import copy
import math
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.errors import ModelError
from fastalign.models.adapters import causal_lm, has_adapter, plain_name

OLDEST = (0, 50)  # of bitsandbytes; earlier ones have no 4-bit kernels for CPUs


def import_bitsandbytes() -> Any:
    """The package bitsandbytes.

    Its import downloads nothing, see `fastalign.models.offline`.

    Raises:
        ModelError: it is missing, broken or too old.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            f"Quantised weights need bitsandbytes, which cannot be imported ({error}): pip install 'fastalign[quant]'."
        ) from error
    version = bitsandbytes.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        raise ModelError(
            f"bitsandbytes is {version}; fastalign needs {'.'.join(map(str, OLDEST))} or newer: "
            "pip install 'fastalign[quant]'."
        )
    return bitsandbytes


def quantization_config(
    quantization: str, double_quantization: bool, dtype: torch.dtype, *, quantize_head: bool = False
) -> Any:
    """The `BitsAndBytesConfig` of transformers for the options of `load_model`.

    Args:
        quantization: "nf4", "fp4" or "int8".
        double_quantization: whether the scales of 4-bit weights are quantised too.
        dtype: what products of 4-bit weights are computed in. Products of 8-bit weights are in the input's dtype.
        quantize_head: whether the output layer is quantised too, which transformers leaves out by default.
    """
    from transformers import BitsAndBytesConfig

    skipped = [] if quantize_head else None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def use_training_product(model: nn.Module) -> None:
    """Lets quantised layers on a CPU compute in evaluation mode as in training mode; the model is changed in place.

    Its method `resize_token_embeddings` raises a ModelError from then on where the embeddings are quantised.

    Raises:
        ModelError: bitsandbytes has rearranged weights of the model already, or a quantised layer shares its weight
            with the embedding.
    """
    check_order(model)
    _check_tied(model)
    base = causal_lm(model)
    if isinstance(base, PreTrainedModel) and has_quantized_embeddings(base):
        base.resize_token_embeddings = _refuse_to_resize
    modules: list[Any] = list(model.modules())
    for module in modules:
        if _is_four_bit(module):
            vars(module).setdefault("_fastalign_avx512bf16", module.support_avx512bf16_for_cpu)
            module.support_avx512bf16_for_cpu = False
        elif _is_eight_bit(module) and "forward" not in vars(module):
            module.forward = types.MethodType(training_product, module)


def restore_product(model: nn.Module) -> None:
    """Takes back what `use_training_product` changed. The forwards themselves are `restore`'s in scoring.py."""
    base: Any = causal_lm(model)
    if vars(base).get("resize_token_embeddings") is _refuse_to_resize:
        del base.resize_token_embeddings
    modules: list[Any] = list(model.modules())
    for module in modules:
        if "_fastalign_avx512bf16" in vars(module):
            module.support_avx512bf16_for_cpu = vars(module).pop("_fastalign_avx512bf16")


def training_product(self: nn.Module, x: Tensor) -> Tensor:
    """The product that bitsandbytes has for a layer in training mode, in whatever mode the layer is.

    A `Linear8bitLt` on a CPU has to believe for the call that it is in training mode.
    """
    if _is_four_bit(self) and x.device.type == "cpu" and self.in_features % _state(self).blocksize:
        raise ModelError(
            f"A quantised layer has {self.in_features} inputs, no multiple of its blocks of {_state(self).blocksize}: "
            f"bitsandbytes dequantises it wrongly on a CPU, and fastalign's own product of it takes no {x.dtype} here; "
            f"call it with {self.compute_dtype}."
        )
    if _is_four_bit(self) or x.device.type != "cpu" or self.training:
        return type(self).forward(self, x)
    self.training = True
    try:
        return type(self).forward(self, x)
    finally:
        self.training = False


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether the module is a linear layer of bitsandbytes. Its attributes decide, so the package stays unimported."""
    return _is_four_bit(module) or _is_eight_bit(module)


def _is_four_bit(module: nn.Module) -> bool:
    return hasattr(module, "support_avx512bf16_for_cpu")


def _is_eight_bit(module: nn.Module) -> bool:
    return hasattr(module, "init_8bit_state")


class QuantizedWeight:
    """The weight (out, in) of a layer of bitsandbytes. Each product dequantises it anew, so no copy of it is kept.

    Attributes:
        shape: (out, in).
        device: where the packed weight lies.
        dtype: what the layer multiplies in; None for an 8-bit layer, which multiplies in its input's dtype.
        row_multiple: rows can be dequantised from every multiple of this number on. Blocks of 4-bit weights, which
            share a scale, may begin inside a row.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.shape = (layer.out_features, layer.in_features)
        self.device = layer.weight.device
        self.dtype: torch.dtype | None = getattr(layer, "compute_dtype", None)
        block = _state(layer).blocksize if _is_four_bit(layer) else 1
        self.row_multiple = block // math.gcd(block, layer.in_features)

    def first(self, count: int) -> QuantizedWeight:
        """The first `count` rows."""
        part = copy.copy(self)
        part.shape = (min(count, self.shape[0]), self.shape[1])
        return part

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight in floating point, (out, in). Each number is rounded once, to `dtype`."""
        if _is_four_bit(self._layer):
            return self._four_bit_rows(0, self.shape[0], dtype)
        packed, scales = _eight_bit_parts(self._layer)
        # The scales are those of -127 to 127.
        return packed[: self.shape[0]].to(dtype).mul_(scales[: self.shape[0]].unsqueeze(1) / 127)

    def dequantize_rows(self, start: int, stop: int, out: Tensor) -> None:
        """Some rows of `dequantize`, with its bits, into memory that exists.

        Args:
            start: the first row, a multiple of `row_multiple`.
            stop: the row after the last one.
            out: (stop - start, in), of the dtype that is wanted. There may be gaps between its rows.
        """
        if not _is_four_bit(self._layer):
            packed, scales = _eight_bit_parts(self._layer)
            torch.mul(
                packed[start:stop], scales[start:stop].unsqueeze(1) / 127, out=out
            )  # rounded once, to out's dtype
            return
        dtype = torch.float32 if out.dtype == torch.float64 else out.dtype  # bitsandbytes has no kernel for float64
        out.copy_(self._four_bit_rows(start, stop, dtype))  # its CPU kernel cannot write into memory that exists

    def _four_bit_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        functional, state = import_bitsandbytes().functional, _state(self._layer)
        width, block = self.shape[1], state.blocksize
        first, last = start * width, stop * width  # numbers, two to a byte
        stored = self._layer.weight.data.view(torch.uint8).view(-1)[first // 2 : -(-last // 2)]
        scales = _scales(state, first // block, -(-last // block), functional)
        # Rows that are no whole blocks are dequantised wrongly by the CPU's kernel (40 % off), so blocks are its rows.
        shape = (stop - start, width)
        if width % block:
            shape = (1, last - first) if (last - first) % block else ((last - first) // block, block)
        part = functional.QuantState(
            scales, shape=shape, dtype=dtype, blocksize=block, quant_type=state.quant_type, code=state.code
        )
        return functional.dequantize_4bit(stored.view(-1, 1), part).view(stop - start, width)


def quantized_weight(layer: nn.Module) -> QuantizedWeight | None:
    """The weight of a layer of bitsandbytes; None where it is not quantised yet, or lies in an order of its own."""
    if _is_four_bit(layer):
        known = _state(layer) is not None and not _is_rearranged(layer.weight)
    else:
        known = all(part is not None for part in _eight_bit_parts(layer))
    return QuantizedWeight(layer) if known else None


def _scales(state: Any, first: int, last: int, functional: Any) -> Tensor:
    """The scales (last - first,) of some blocks, in float32. They may be quantised themselves, in larger blocks."""
    if not state.nested:
        return state.absmax[first:last]
    size = state.state2.blocksize
    start = first - first % size
    nested = functional.QuantState(
        state.state2.absmax[start // size : -(-last // size)], code=state.state2.code, blocksize=size,
        dtype=state.state2.dtype,
    )  # fmt: skip
    scales = functional.dequantize_blockwise(state.absmax[start:last], nested)
    return (scales + state.offset)[first - start :].float()


def _state(layer: Any) -> Any:
    """The scales and the shape of a 4-bit weight. FSDP loses those that the weight carries, and the layer has them."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def _eight_bit_parts(layer: Any) -> tuple[Any, Any]:
    """An 8-bit layer's packed weight (out, in) and scales (out,). Its first call moves both to the layer's `state`."""
    holder = layer.weight if getattr(layer.weight, "CB", None) is not None else layer.state
    return holder.CB, holder.SCB


def compute_in_float32(model: nn.Module) -> None:
    """Lets a model with quantised layers compute in float32: what is unquantised, and the products of the layers."""
    model.float()
    modules: list[Any] = list(model.modules())
    for module in modules:
        if _is_four_bit(module):
            module.compute_dtype = torch.float32


def dequantize_layers(model: nn.Module) -> None:
    """Puts a linear layer in float32 in the place of every quantised one; the model is changed in place.

    Raises:
        ModelError: bitsandbytes has rearranged the weights of a layer.
    """
    check_order(model)
    for name, layer in [(name, module) for name, module in model.named_modules() if is_quantized_layer(module)]:
        weight = quantized_weight(layer)
        assert weight is not None  # `check_order` refuses what has none
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight.dequantize(torch.float32), requires_grad=False)
        plain.bias = layer.bias  # pyright: ignore[reportAttributeAccessIssue] - a layer of bitsandbytes is an nn.Linear
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


def stored_quantization(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `load_model` with which a model was quantised, from `quantization_config` of its config.json."""
    if stored.get("load_in_8bit"):
        return {"quantization": "int8", "double_quantization": False}
    return {
        "quantization": stored.get("bnb_4bit_quant_type", "fp4"),
        "double_quantization": bool(stored.get("bnb_4bit_use_double_quant")),
    }


def check_order(model: nn.Module) -> None:
    """Refuses a model whose weights bitsandbytes has rearranged, now or before it was saved.

    Raises:
        ModelError: The model has such weights.
    """
    layers = [name for name, weight in _weights(model) if _is_rearranged(weight)]
    if layers:
        raise ModelError(
            f"bitsandbytes has rearranged the weights of {len(layers)} layer{'s' * (len(layers) > 1)} "
            f"({layers[0]}{', ...' * (len(layers) > 1)}) for inference on this CPU, and cannot be trained "
            "or saved in that order: load the model anew and pass it to fastalign before it is evaluated; where its "
            "folder was saved in this state, quantise the original model again."
        )


def quantized_layers(model: nn.Module) -> list[str]:
    """The names of the layers whose weight is quantised."""
    return [name for name, weight in _weights(model) if _is_packed(weight)]


def has_quantized_embeddings(model: PreTrainedModel) -> bool:
    """Whether the embedding or the output layer of a model is quantised."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = (getattr(layer, "weight", None) for layer in layers)
    return any(isinstance(weight, Tensor) and _is_packed(weight) for weight in weights)


def check_unquantized(model: nn.Module, remedy: str) -> None:
    """Refuses quantised layers where weights must have gradients. Adapters on such layers can be trained.

    Args:
        model: The model to look at.
        remedy: What the caller can do, for the error.

    Raises:
        ModelError: The model has quantised layers and no adapter.
    """
    layers = [] if has_adapter(model) else quantized_layers(model)
    if layers:
        raise ModelError(
            f"{len(layers)} layers of the model are quantised ({layers[0]}, ...), and quantised weights have no "
            f"gradient: {remedy}."
        )


def float_weight(weight: Tensor) -> Tensor:
    """The weight of an output layer in floating point.

    Args:
        weight: (V, H) in floating point, or packed in 4 bits by bitsandbytes.

    Returns:
        (V, H): `weight` itself where it is in floating point, else a dequantised copy in the dtype that bitsandbytes
        noted when it packed the weight.

    Raises:
        ModelError: the weight is quantised in another way, or bitsandbytes has rearranged it.
    """
    if not _is_packed(weight):
        return weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ModelError(
            f"The output layer holds {weight.dtype} weights of an unknown quantisation; load it unquantised "
            "(llm_int8_skip_modules=['lm_head'])."
        )
    if _is_rearranged(weight):
        raise ModelError("bitsandbytes has rearranged the weights of the output layer: load the model anew.")
    return import_bitsandbytes().functional.dequantize_4bit(weight.data, state)


def _check_tied(model: nn.Module) -> None:
    """ModelError if transformers made a layer of bitsandbytes around the embedding's weight, which stays in floats."""
    for name, module in model.named_modules():
        if is_quantized_layer(module) and type(module.weight) is nn.Parameter:
            raise ModelError(
                f"The layer {plain_name(name)} is quantised, but its weight is that of the embedding, which is not: "
                "quantise with llm_int8_skip_modules=['lm_head'], or untie the two first (tie_word_embeddings=False)."
            )


def _refuse_to_resize(*args: Any, **kwargs: Any) -> NoReturn:
    raise ModelError(
        "The vocabulary cannot be resized, because the output layer is quantised or the embedding is: call "
        "resize_token_embeddings before the model is quantised."
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weight of every layer with the layer's plain name.

    peft's layers are left out: their attribute `weight` is that of the layer inside them.
    """
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            yield plain_name(f"{name}.weight").removesuffix(".weight"), weight


def _is_packed(weight: Tensor) -> bool:
    """Whether a weight is quantised. `bnb_4bit_quant_storage` may call the bytes of a 4-bit weight bfloat16."""
    return not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None


def _is_rearranged(weight: Any) -> bool:
    """Whether bitsandbytes has ever rearranged a weight: it marks the weight's state, and transposes its scales."""
    state = getattr(weight, "quant_state", None)
    return state is not None and (hasattr(state, "packing_format_for_cpu") or state.absmax.dim() != 1)
