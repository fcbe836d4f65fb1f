"""f-DPO against numbers worked out by hand, 60-digit arithmetic, and the limits that join the divergences."""

from __future__ import annotations

from functools import partial
from math import exp, log, log1p, sqrt

import mpmath
import pytest
import torch

from fastalign.errors import InputError
from fastalign.losses import ALIASES, PAIRWISE
from fastalign.losses.divergence import dpo_alpha, dpo_forward_kl, dpo_js
from fastalign.losses.preference import dpo

# r_w = 9 and r_l = 1/4, with beta = 1/2.
U, V = 2 * log(3), -2 * log(2)
BY_HAND = {
    # f'(r) = -1/r: -1/9 + 4 = 35/9.
    "forward_kl": (dpo_forward_kl, {}, log1p(exp(-0.5 * 35 / 9))),
    # f'(r) = 2 (1 - r^-1/2): 2 (1 - 1/3) - 2 (1 - 2) = 10/3.
    "alpha": (dpo_alpha, {"alpha": 0.5}, log1p(exp(-0.5 * 10 / 3))),
    # f'(r) = log(2r / (1 + r)): log(18/10) - log(1/2 / (5/4)) = log(9/2); s(1/2 log(9/2)) = sqrt(4.5)/(1 + sqrt(4.5)).
    "js": (dpo_js, {}, log(1 + 1 / sqrt(4.5))),
    "js, smoothed": (dpo_js, {"label_smoothing": 0.1}, 0.9 * log(1 + 1 / sqrt(4.5)) + 0.1 * log(1 + sqrt(4.5))),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    loss, options, expected = BY_HAND[case]
    inputs = [torch.tensor([value], dtype=torch.float64) for value in (-10 + U, -12 + V, -10, -12)]
    tolerance = 32 * torch.finfo(torch.float64).eps * 12 * 4  # inputs up to 12, exponentials up to 4
    assert loss(*inputs, beta=0.5, **options).tolist() == pytest.approx([expected], abs=tolerance)


def nll(x):
    return mpmath.log1p(mpmath.exp(-x))


def on_ratios(loss, u, v, **options):
    return loss(u, v, torch.zeros_like(u), torch.zeros_like(v), **options)


RATIOS = (-70.0, -20.0, -1.5, -1e-3, 0.0, 0.7, 12.0, 60.0, 1e4)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1.0])
def test_alpha_float32_is_accurate_wherever_float32_can_hold_the_value(alpha, assert_accurate):
    def exact(u, v):
        return nll(mpmath.mpf(0.1) * (mpmath.exp(-alpha * v) - mpmath.exp(-alpha * u)) / mpmath.mpf(alpha))

    points = [(u, v) for u in RATIOS for v in RATIOS]
    assert_accurate(partial(on_ratios, dpo_alpha, alpha=alpha), [exact], points)


def test_js_float32_is_accurate_at_any_margin(assert_accurate):
    ratios = (*RATIOS, -1e4)
    points = [(u, v) for u in ratios for v in ratios]
    assert_accurate(partial(on_ratios, dpo_js), [lambda u, v: nll(mpmath.mpf(0.1) * (nll(v) - nll(u)))], points)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [dpo_forward_kl, partial(dpo_alpha, alpha=0.1)])
def test_beyond_the_range_of_the_dtype_values_and_gradients_stay_finite_and_pull_the_right_way(loss, dtype):
    chosen = torch.tensor([-1e4, -1e4, -9e3, 1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([1e4, -1e4, -1e4, -1e4], dtype=dtype, requires_grad=True)
    values = on_ratios(loss, chosen, rejected)
    grads = torch.stack(torch.autograd.grad(values.sum(), (chosen, rejected)))
    assert torch.isfinite(values).all() and torch.isfinite(grads).all()
    assert values[0] > 1e30 and values[1].item() == pytest.approx(log(2)) and values[2:].tolist() == [0.0, 0.0]
    # Lost pairs pull chosen up and rejected down, won pairs rest.
    assert grads[0, 0] < -1e30 and grads[0, 1] < -1e30 and grads[1, 1] > 1e30 and grads[1, 0] >= 0
    assert grads[:, 2:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_the_continuation_joins_without_a_step():
    # One float32 step either side of the joint at 88.72 - 14: the value moves by one step times the slope.
    joint = torch.tensor(log(torch.finfo(torch.float32).max) - 14)
    around = torch.stack([joint.nextafter(torch.tensor(-torch.inf)), joint, joint.nextafter(torch.tensor(torch.inf))])
    chosen = (-around).requires_grad_()
    values = on_ratios(dpo_forward_kl, chosen, torch.zeros(3))
    (slopes,) = torch.autograd.grad(values.sum(), chosen)
    step = (around[2] - around[0]).item()
    eps = torch.finfo(torch.float32).eps
    for series in (values, slopes):
        assert (series / series[0] - 1).abs().max() <= step + 8 * eps


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [-4 * torch.rand(6, dtype=torch.float64, generator=generator) for _ in range(4)]


def test_reverse_kl_is_dpo_and_the_limit_of_alpha_at_zero():
    assert PAIRWISE[ALIASES["reverse_kl"]].function is dpo
    # exp(-alpha a) = 1 - alpha a + O(alpha^2 a^2 / 2) with |a| <= 4: the margin is off by at most 2 * 8 alpha.
    limit = dpo_alpha(*inputs(), alpha=1e-9)
    torch.testing.assert_close(limit, dpo(*inputs()), rtol=0, atol=0.1 * 16e-9)


def test_forward_kl_is_alpha_at_one():
    assert torch.equal(dpo_forward_kl(*inputs(), beta=0.3), dpo_alpha(*inputs(), beta=0.3, alpha=1.0))


def test_js_is_dpo_for_small_ratios_and_half_of_beta():
    # log s(a) has the slope 1/2 at 0, and curvature at most 1/4.
    chosen, rejected, _, _ = (1e-6 * tensor for tensor in inputs())
    zero = torch.zeros_like(chosen)
    expected = dpo(chosen, rejected, zero, zero, beta=0.1)
    torch.testing.assert_close(dpo_js(chosen, rejected, zero, zero, beta=0.2), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("alpha", [0.0, 1.5, float("nan")])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(InputError, match=rf"alpha is {alpha}; expected a number in \(0, 1\]"):
        dpo_alpha(*inputs(), alpha=alpha)
