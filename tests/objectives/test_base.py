"""Metrics as sums and counts."""

import torch

from fastalign.objectives.base import mean_of


def test_a_mean_is_its_sum_and_count_without_a_graph():
    total, count = mean_of(torch.tensor([1.0, 2.0, 6.0], requires_grad=True))
    assert (total.item(), count.item()) == (9, 3) and total.shape == count.shape == ()
    assert not total.requires_grad
