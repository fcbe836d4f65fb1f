"""Tile shapes, and the bounds that follow from them."""

from __future__ import annotations

import pytest
import torch

from fastalign.ops.head import tiling


@pytest.mark.parametrize(("gigabytes", "rows"), [(141, 2048), (80, 1280), (40, 640), (24, 384), (16, 256), (6, 256)])
def test_a_gpus_tile_takes_a_thousandth_of_its_memory(gigabytes, rows):
    assert tiling.gpu_tile_shape(gigabytes << 30) == (rows, 16384)


def test_a_graph_traced_for_a_gpu_that_is_not_here_has_a_tile_shape():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert tiling.logprobs_tile_shape(torch.device("cuda:7")) == tiling.gpu_tile_shape(16 << 30)


@pytest.mark.parametrize("shape", [tiling.logprobs_tile_shape, tiling.divergence_tile_shape])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tiles_hold_whole_multiples_of_rows(device, shape):
    rows, columns = shape(torch.device(device))
    assert rows % tiling.ROW_MULTIPLE == 0 and columns > 0


def test_tiles_cover_the_vocabulary_once():
    assert tiling.vocabulary_tiles(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert tiling.vocabulary_tiles(8, 4) == [(0, 4), (4, 8)]
    assert tiling.row_slices(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert tiling.row_slices(0, 2) == []


@pytest.mark.parametrize(("rows", "padded"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_rows_are_padded_with_zeros(rows, padded):
    assert tiling.round_up_rows(rows) == padded
    t = tiling.pad_rows(torch.ones(rows, 3))
    assert t.shape == (padded, 3) and t[:rows].eq(1).all() and not t[rows:].any()
    assert tiling.pad_rows(torch.ones(rows)).shape == (padded,)
