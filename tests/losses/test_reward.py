"""The Bradley-Terry loss against its formula, and at differences where an exponential would overflow."""

from __future__ import annotations

import math

import torch

from fastalign.losses.reward import bradley_terry


def test_the_loss_is_its_formula():
    chosen, rejected, margin = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, -2.0], [0.5, 3.0], [0.2, 0.0]))
    expected = [math.log1p(math.exp(-(0.5 - 0.2))) + 0.1 * 1.5**2, math.log1p(math.exp(5.0)) + 0.1 * 1.0]
    found = bradley_terry(chosen, rejected, margin, center_rewards_coefficient=0.1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_loss_and_its_gradient_are_finite_far_away():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = bradley_terry(chosen, torch.zeros(2))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1e4] and chosen.grad.tolist() == [0.0, -1.0]
