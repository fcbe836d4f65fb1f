"""From products to logits: against the reference, and the slope against autograd."""

from __future__ import annotations

import pytest
import torch

from fastalign import reference
from fastalign.ops.head.transform import LogitTransform, pack_transform, unpack_transform

TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(-0.6, None, 1.7),
    "capped": LogitTransform(1.3, 3.0, 0.7),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_logits_and_slope(name):
    transform = TRANSFORMS[name]
    u = torch.linspace(-9, 9, 41, dtype=torch.float64).requires_grad_()
    one = torch.ones(1, 1, dtype=torch.float64)
    z = reference.linear_logits(u.unsqueeze(1), one, **transform._asdict()).squeeze(1)
    (slope,) = torch.autograd.grad(z.sum(), u)
    logits, varying = transform.logits_and_slope_(u.detach().clone())
    torch.testing.assert_close(logits, z.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(transform.slope(logits), slope, rtol=1e-12, atol=1e-14)
    if varying is None:
        assert transform.softcap is None and slope.eq(transform.factor).all()
    else:
        torch.testing.assert_close(varying, slope, rtol=1e-12, atol=1e-14)
    assert torch.equal(transform.logits_(u.detach().clone()), logits)


def test_a_saturated_cap_has_slope_0():
    transform = LogitTransform(1.3, 3.0, 0.7)
    z = transform.logits_(torch.tensor([-1e9, 1e9]))
    assert transform.slope(z).tolist() == [0.0, 0.0]
    assert transform.slope(torch.tensor([-1e30])).item() == 0.0, "a ruled-out entry"


@pytest.mark.parametrize("name", TRANSFORMS)
def test_three_numbers_carry_it_through_a_schema(name):
    numbers = pack_transform(*TRANSFORMS[name])
    assert all(isinstance(number, float) for number in numbers)
    assert unpack_transform(list(numbers)) == TRANSFORMS[name]
