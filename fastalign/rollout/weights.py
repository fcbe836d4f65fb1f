"""The weights of a linear layer as decoding reads them, with its LoRA adapters merged.

A LoRA layer computes `x W' + s (x A') B'`. That is two more products per layer, and at one token per row each of them
waits for memory. So decoding merges `W + s B A` once per rollout, into a matrix of its own. The matrix is always formed
from the layer's original weight, never by taking an older adapter off a merged one: rounding would add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastalign.errors import ModelError
from fastalign.models.adapters import Lora, unwrap_layer
from fastalign.models.head import Head
from fastalign.models.linear import PLAIN_TENSORS

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class NotDecodable(Exception):
    """The model has a part that the decode loop does not know. The text says which."""


class Matrix:
    """A linear layer's weight with its adapters merged.

    A layer without an adapter shares its weight with the model. Otherwise the weight is a copy, which `refresh` brings
    up to date in place.

    Args:
        layer: A linear layer, with or without LoRA adapters on it.

    Attributes:
        weight: (out, in).
        bias: (out,), or None.

    Raises:
        NotDecodable: The layer is of another kind, or its adapter does more than `W + s B A`.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self._copy: Tensor | None = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the present weight and adapters of the layer."""
        plain, adapters = _plain_and_adapters(self.layer)
        # Read anew each time: others may put new storage behind a parameter, as a swap of reference weights does.
        self.weight: Tensor = plain.weight.detach()
        self.bias: Tensor | None = None if plain.bias is None else plain.bias.detach()
        if adapters:
            self._copy = torch.empty_like(self.weight) if self._copy is None else self._copy
            _merge(self.weight, adapters, self._copy)
            self.weight = self._copy


def product(x: Tensor, matrix: Matrix | Head) -> Tensor:
    """`x weight' + bias`, (R, in) -> (R, out), by the library that is fastest for few rows.

    For 8 rows oneDNN takes half to two thirds of the time of MKL, on Intel processors too, and for 32 rows as long.
    """
    weight = matrix.dense_weight if isinstance(matrix, Head) else matrix.weight
    bias = matrix.bias
    if x.device.type == "cpu" and x.dtype == torch.float32 and _HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return linear(x, weight, bias)


def _plain_and_adapters(layer: Any) -> tuple[nn.Linear, list[Lora]]:
    try:
        plain, adapters = unwrap_layer(layer)
    except ModelError as error:
        raise NotDecodable(str(error)) from error
    if type(plain) is not nn.Linear or type(plain.weight) not in PLAIN_TENSORS:
        raise NotDecodable(f"a layer is a {type(plain).__name__}, not a plain linear layer")
    if not all(lora.is_plain and not lora.is_transposed for lora in adapters):
        raise NotDecodable("an adapter has a bias, is a variant such as DoRA, or lies on a transposed layer")
    return plain, adapters


def _merge(weight: Tensor, adapters: list[Lora], out: Tensor) -> None:
    """`out = weight + sum of s B A`. The sum is formed in the adapters' dtype, float32, and rounded once."""
    first = adapters[0]
    if weight.dtype == first.a.dtype and len(adapters) == 1:
        torch.addmm(weight, first.b, first.a, alpha=first.scaling, out=out)
        return
    merged = weight.to(first.a.dtype)
    for lora in adapters:
        merged = torch.addmm(merged, lora.b, lora.a, alpha=lora.scaling)
    out.copy_(merged)
