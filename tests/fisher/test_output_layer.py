"""The output layer's squared gradients against autograd, one sample after another."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from fastalign.fisher import output_layer
from fastalign.fisher.output_layer import HeadFisher, add_sums, logits_tile
from fastalign.models.head import Head
from fastalign.reference import linear_logits

N, H, V = 7, 5, 11  # scored tokens, width, vocabulary
CU_SEQLENS = torch.tensor([0, 3, 3, 7])  # the second sample has no scored token


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(H, V).double()
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=generator)
    return layer, Head(layer.weight.detach(), layer.bias.detach(), 0.7, 3.0), hidden, targets


def gradients(layer, hidden, targets, head):
    """Per sample the gradients of -0.5 times its log-likelihood, by autograd."""
    logits = linear_logits(hidden, layer.weight, **{**head.options(), "bias": layer.bias})
    losses = -0.5 * logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    bounds = CU_SEQLENS.tolist()
    for start, stop in pairwise(bounds):
        yield torch.autograd.grad(losses[start:stop].sum(), [layer.weight, layer.bias], retain_graph=True)


@pytest.mark.parametrize("tile", [4, 512])
@pytest.mark.parametrize("tied", [False, True])
def test_squares_are_those_of_autograd(problem, tied, tile, monkeypatch):
    monkeypatch.setattr(output_layer, "VOCAB_TILE", tile)
    layer, head, hidden, targets = problem
    sums = {"weight": torch.zeros(V, H, dtype=torch.float64), "bias": torch.zeros(V, dtype=torch.float64)}
    part = HeadFisher(layer, {id(layer.weight): "weight", id(layer.bias): "bias"}, sums)
    # As embedding the weight has a gradient in the rows of a sample's input tokens, here 1 and 9, 4, 1.
    roles = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 9, 4, 1]), torch.randn(4, H, dtype=torch.float64)
    logprobs = linear_logits(hidden, head.weight, **head.options()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    part.add(hidden, targets, logprobs, head, CU_SEQLENS, 0.5, roles if tied else None)
    expected = [torch.zeros(V, H).double(), torch.zeros(V).double()]
    for sample, (d_weight, d_bias) in enumerate(gradients(layer, hidden, targets, head)):
        if tied:
            mine = roles[0] == sample
            d_weight.index_add_(0, roles[1][mine], roles[2][mine])
        expected[0] += d_weight**2
        expected[1] += d_bias**2
    torch.testing.assert_close(sums["weight"], expected[0])
    torch.testing.assert_close(sums["bias"], expected[1])


def test_logits_of_a_part_of_the_vocabulary(problem):
    _, head, hidden, _ = problem
    whole, slope = logits_tile(hidden, head, slice(0, V))
    torch.testing.assert_close(whole, linear_logits(hidden, head.weight, **head.options()))
    rows = torch.tensor([9, 2])
    part, part_slope = logits_tile(hidden, head, rows)
    torch.testing.assert_close(part, whole[:, rows])
    torch.testing.assert_close(part_slope, slope[:, rows])
    assert logits_tile(hidden, Head(head.weight, None, 0.7, None), rows)[1] == 0.7  # dz/du without a cap


def test_sums_are_squared_by_sample():
    sums = torch.zeros(2)
    add_sums(sums, torch.tensor([[1.0, 2.0], [3.0, -2.0], [5.0, 0.5]]), torch.tensor([0, 2, 3]))
    assert sums.tolist() == [16.0 + 25.0, 0.25]
