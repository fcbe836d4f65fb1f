"""Quantised output layers."""

import sys
import types

import pytest
import torch

from fastalign.errors import ModelError
from fastalign.models.quantization import float_weight


def test_floating_point_is_not_copied():
    weight = torch.randn(3, 2, dtype=torch.bfloat16)
    assert float_weight(weight) is weight


def test_an_unknown_quantisation_is_refused():
    with pytest.raises(ModelError, match=r"holds torch\.int8 weights of an unknown quantisation; load it unquantised"):
        float_weight(torch.zeros(3, 2, dtype=torch.int8))


def test_four_bits_go_to_bitsandbytes_with_their_state(monkeypatch):
    """The library is not on every machine: a stand-in shows what it is given."""
    functional = types.ModuleType("bitsandbytes.functional")
    functional.dequantize_4bit = lambda packed, state: (packed.float() - 8) * state
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    packed = torch.tensor([[7], [9]], dtype=torch.uint8)
    packed.quant_state = 0.5
    assert float_weight(packed).tolist() == [[-0.5], [0.5]]
