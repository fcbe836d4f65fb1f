"""The options that load a model with weights in 4 or 8 bits. They are checked without torch."""

from __future__ import annotations

from typing import Literal, get_args

from fastalign.errors import ConfigError
from fastalign.options import one_of

Quantization = Literal["none", "nf4", "fp4", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
FOUR_BITS = ("nf4", "fp4")


def check_quantization(quantization: str, double_quantization: bool, quantize_head: bool = False) -> None:
    """Checks the options against each other.

    Args:
        quantization: "none", "nf4", "fp4" or "int8".
        double_quantization: whether the scales of 4-bit weights are quantised too.
        quantize_head: whether the output layer is quantised too.

    Raises:
        ConfigError: the name is unknown, or an option is set that quantises more while nothing is quantised.
    """
    one_of("quantization", quantization, QUANTIZATIONS)
    if double_quantization and quantization not in FOUR_BITS:
        raise ConfigError(f"double_quantization is for quantization nf4 or fp4, not {quantization!r}; leave it out")
    if quantize_head and quantization == "none":
        raise ConfigError("quantize_head is True and quantization 'none'; set quantization to nf4, fp4 or int8 too")
