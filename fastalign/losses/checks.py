"""The checks that every loss over log-probabilities begins with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.errors import InputError


def check_logprobs(beta: float, label_smoothing: float = 0.0, /, **logprobs: Tensor) -> None:
    """Checks what a loss is given. Only shapes, dtypes and devices of the tensors are read.

    Their values are not read: on a GPU the host would wait until all earlier work is done.

    Args:
        beta: Must be a finite number above 0.
        label_smoothing: Must lie in [0, 0.5).
        **logprobs: The tensors by their names: (B,) float32 or float64, all alike in shape, dtype and device.

    Raises:
        InputError: One of them is not so.
    """
    first_name, first = next(iter(logprobs.items()))
    for name, tensor in logprobs.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != 1 or tensor.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{name} is {describe(tensor)}; expected one log-probability per sequence, a (B,) tensor of float32 "
                "or float64: sum the token log-probabilities of each sequence, in float32."
            )
        if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
            raise InputError(
                f"{name} is {describe(tensor)} but {first_name} is {describe(first)}; expected the same shape, dtype "
                "and device: pass one entry per pair in each."
            )
    if not isinstance(beta, (int, float)) or not 0 < beta < math.inf:
        raise InputError(f"beta is {beta!r}; expected a finite number above 0: 0.1 is the usual start.")
    if not 0 <= label_smoothing < 0.5:
        raise InputError(
            f"label_smoothing is {label_smoothing!r}; expected a probability in [0, 0.5): where half the labels or "
            "more are flipped, swap chosen and rejected."
        )


def describe(value: object) -> str:
    """Shape, dtype and device of a tensor, or the type of anything else, for an error message."""
    if isinstance(value, Tensor):
        return f"a {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} tensor on {value.device}"
    return f"a {type(value).__name__}"
