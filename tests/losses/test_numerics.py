"""The elementary functions of the losses against 60-digit arithmetic."""

from __future__ import annotations

import mpmath
import pytest
import torch

from fastalign.losses.numerics import log1mexp, logistic_loss, sigmoid


def test_log1mexp_is_accurate_on_both_sides_of_its_branch():
    x = torch.tensor([-1e-30, -1e-6, -0.693, -0.694, -5.0, -50.0, -1e4], requires_grad=True)
    values = log1mexp(x)
    (slopes,) = torch.autograd.grad(values.sum(), x)
    eps = torch.finfo(torch.float32).eps
    with mpmath.workdps(60):
        for at, value, slope in zip(x.tolist(), values.tolist(), slopes.tolist(), strict=True):
            exact_slope = -1 / mpmath.expm1(-mpmath.mpf(at))
            # Four roundings of the value; an error eps of x moves the value by |x * slope| eps.
            exact_value = mpmath.log(-mpmath.expm1(mpmath.mpf(at)))
            assert abs(value - exact_value) <= 4 * eps * (abs(exact_value) + abs(at * exact_slope)) + 1e-38
            assert abs(slope - exact_slope) <= 4 * eps * abs(exact_slope) * (1 + abs(at)) + 1e-38
    assert log1mexp(torch.zeros(1)).item() == -torch.inf


def test_sigmoid_has_a_gradient_where_its_value_has_rounded_to_one():
    x = torch.tensor([30.0, -30.0, 0.0], requires_grad=True)
    values = sigmoid(x)
    (slopes,) = torch.autograd.grad(values.sum(), x)
    with mpmath.workdps(60):
        exact = [float(mpmath.exp(-at) / (1 + mpmath.exp(-at)) ** 2) for at in x.tolist()]
    assert values[0] == 1.0
    assert slopes.tolist() == pytest.approx(exact, rel=1e-5, abs=0.0)


def test_logistic_loss_is_finite_at_any_argument_and_weighs_both_labels():
    x = torch.tensor([1e4, -1e4, 0.0])
    assert logistic_loss(x, 0.0).tolist() == pytest.approx([0.0, 1e4, 0.6931472])
    assert logistic_loss(x, 0.25).tolist() == pytest.approx([2500.0, 7500.0, 0.6931472])
