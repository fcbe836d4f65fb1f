"""Merged weights are formed from the original ones, in place, and layers without an adapter are not copied."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fastalign.rollout.weights import Matrix, NotDecodable, product


def _lora(dtype=torch.float32, **options):
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(6, 5).to(dtype))
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **options)
    layer = get_peft_model(holder, config).base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    return layer


def test_a_layer_without_an_adapter_shares_its_weight():
    layer = nn.Linear(6, 5)
    matrix = Matrix(layer)
    assert matrix.weight.data_ptr() == layer.weight.data_ptr()
    torch.testing.assert_close(product(torch.ones(3, 6), matrix), layer(torch.ones(3, 6)))


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-6), (torch.bfloat16, 0.05)])
def test_an_adapter_is_merged_and_refreshed_from_the_original(dtype, off):
    layer = _lora(dtype)
    original, matrix = layer.base_layer.weight.clone(), Matrix(layer)
    address, x = matrix.weight.data_ptr(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    for _ in range(3):
        layer.lora_A["default"].weight.data.normal_()
        matrix.refresh()
        torch.testing.assert_close(product(x, matrix), layer(x).to(dtype), rtol=off, atol=off)
    assert matrix.weight.data_ptr() == address and torch.equal(layer.base_layer.weight, original)
    layer.lora_B["default"].weight.data.zero_()
    matrix.refresh()
    assert torch.equal(matrix.weight, original)  # no trace of the adapters before


def test_adapters_that_do_more_than_a_sum_are_refused():
    with pytest.raises(NotDecodable, match="DoRA"):
        Matrix(_lora(use_dora=True))
    with pytest.raises(NotDecodable, match="Conv1d"):
        Matrix(nn.Conv1d(3, 3, 1))
