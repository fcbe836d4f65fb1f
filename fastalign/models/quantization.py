"""Quantised weights as floating-point numbers. The only module that imports bitsandbytes."""

from __future__ import annotations

from torch import Tensor

from fastalign.errors import ModelError


def float_weight(weight: Tensor) -> Tensor:
    """The weight of an output layer in floating point.

    Args:
        weight: (V, H) in floating point, or packed in 4 bits by bitsandbytes.

    Returns:
        (V, H): `weight` itself where it is in floating point, else a dequantised copy in the dtype that bitsandbytes
        noted when it packed the weight.

    Raises:
        ModelError: the weight is quantised in another way.
    """
    if weight.is_floating_point():
        return weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ModelError(
            f"The output layer holds {weight.dtype} weights of an unknown quantisation; load it unquantised "
            "(llm_int8_skip_modules=['lm_head'])."
        )
    # Imported here: not every machine has it, and its import may load a binary.
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]  # optional

    return dequantize_4bit(weight.data, state)
