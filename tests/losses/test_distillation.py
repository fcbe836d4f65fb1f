"""The mixture of a loss on data with the divergence from a teacher."""

from __future__ import annotations

import torch

from fastalign.losses.distillation import distillation_loss
from fastalign.reference import logits_divergence


def test_by_hand():
    align, divergence = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.5])
    assert distillation_loss(align, divergence).tolist() == [2.0, 2.25]
    # a = 1/4, tau^2 = 4: 1/4 + 3/4 * 4 * 3 and 1 + 3/4 * 4 * 1/2.
    assert distillation_loss(align, divergence, weight=0.25, temperature=2.0).tolist() == [9.25, 2.5]


def test_the_gradient_hardly_depends_on_a_high_temperature():
    student = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-0.4, 0.2, 0.5]], dtype=torch.float64)
    grads = []
    for temperature in (50.0, 100.0):
        divergence = logits_divergence(student, teacher, temperature=temperature)
        loss = distillation_loss(torch.zeros(1), divergence, weight=0.0, temperature=temperature)
        grads.append(torch.autograd.grad(loss.sum(), student)[0])
    # The gradient is (z - t) / 3 for centred logits, up to terms of order 1 / tau.
    assert (grads[0] - grads[1]).abs().max() < 0.02 * grads[0].abs().max()
