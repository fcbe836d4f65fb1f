"""Tiles of an output layer that does not exist as one matrix."""

from __future__ import annotations

import pytest
import torch

from fastalign.ops.head import weights
from fastalign.ops.head.weights import ComposedWeight, product_dtype


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tiles_put_together_are_the_definition(dtype, spare, monkeypatch):
    monkeypatch.setattr(weights, "_entries", lambda *args: 16)
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*shape, generator=generator) for shape in ((50, 8), (2, 8), (50, 2)))
    ids, rows = torch.tensor([49, 3, 16]), torch.randn(3, 8, generator=generator)
    composed = ComposedWeight(weight, b, 0.5, (ids, rows))
    found, hidden = [], torch.randn(5, 8, generator=generator)
    bounds = []
    for start, stop, tile in composed.tiles(torch.empty(0, dtype=dtype), spare=spare):
        assert tile.dtype == dtype and tile.shape == (stop - start + spare, 10)
        if spare:
            assert torch.equal(tile[-1], tile[-2])
        found.append(tile[: stop - start].double().clone())  # the next tile lies in the same memory
        bounds.append((start, stop))
    assert bounds == [(0, 16), (16, 32), (32, 48), (48, 50)]
    wide = torch.cat([hidden, hidden @ a.T], 1).double()
    exact = hidden.double() @ composed.dense(a, torch.float64).T
    limit = {torch.bfloat16: 0.05}.get(dtype, 1e-5)
    torch.testing.assert_close(wide @ torch.cat(found).T, exact, rtol=limit, atol=limit)
    assert torch.equal(weight[3], ComposedWeight(weight).dense(None, torch.float32)[3])


def test_tiles_hold_whole_blocks_of_a_packed_weight():
    for row_bytes, multiple in ((1152, 1), (1152, 4), (1 << 20, 3), (10, 512)):
        entries = weights._entries(row_bytes, torch.device("cpu"), multiple)
        assert entries % multiple == 0 and 0 < entries <= 16384


def test_a_packed_weight_may_leave_the_dtype_to_the_hidden_states():
    class Packed:
        dtype = None

    assert product_dtype(torch.empty(1, dtype=torch.bfloat16), Packed()) == torch.bfloat16
    assert product_dtype(torch.empty(1, dtype=torch.bfloat16), torch.empty(1)) == torch.float32
