"""One tile of the divergences against the reference in float64, and the running normaliser."""

from __future__ import annotations

import pytest
import torch

from fastalign import reference
from fastalign.ops.head.divergence_terms import DivergenceKind, LogSumExp, gradient, gradient_scale, terms
from fastalign.ops.head.tiling import START
from fastalign.ops.head.transform import LogitTransform

R, T = 6, 40


def logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(R, T, generator=generator, dtype=torch.float64) for _ in range(2))


def stats_of(a, b):
    top = [z.amax(1) for z in (a, b)]
    sums = [(z - m.unsqueeze(1)).exp().sum(1).log() for z, m in zip((a, b), top, strict=True)]
    return torch.stack([top[0], sums[0], top[1], sums[1]], 1)


@pytest.mark.parametrize("kind", reference.DIVERGENCES)
def test_values_and_gradients_of_a_whole_row(kind):
    a, b = logits()
    leaf = a.clone().requires_grad_()
    expected = reference.logits_divergence(leaf, b, divergence=kind, jsd_beta=0.3)
    (grad,) = torch.autograd.grad(expected.sum(), leaf)
    divergence, transform = DivergenceKind(kind, 0.3), LogitTransform()
    stats = stats_of(a, b)
    value, moment = terms(a, b, stats, divergence, transform, (torch.empty_like(a), torch.empty_like(a)))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-14)
    found = gradient(a, b, torch.zeros(R) if moment is None else moment, divergence, transform)
    torch.testing.assert_close(found, grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", reference.DIVERGENCES)
def test_equal_sides_have_no_divergence_and_no_gradient(kind):
    a, _ = logits()
    b, divergence = a.clone(), DivergenceKind(kind, 0.3)
    value, moment = terms(
        a, b, stats_of(a, b), divergence, LogitTransform(), (torch.empty_like(a), torch.empty_like(a))
    )  # fmt: skip
    assert not value.any()
    assert not gradient(a, b, torch.zeros(R) if moment is None else moment, divergence, LogitTransform()).any()


def test_the_constant_factor_of_the_gradient():
    scaled, capped = LogitTransform(3.0, None, 2.0), LogitTransform(3.0, 5.0, 2.0)
    assert gradient_scale(DivergenceKind("forward_kl", 0.3), scaled) == 1.5
    assert gradient_scale(DivergenceKind("jsd", 0.25), scaled) == 0.75 * 1.5
    assert gradient_scale(DivergenceKind("jsd", 0.25), capped) == 0.75, "the slope of a cap varies, so tiles contain it"


def test_a_logsumexp_does_not_depend_on_where_tiles_end():
    z, _ = logits()
    z[0, :20] = START  # a whole tile that is ruled out
    sums = LogSumExp(R, z)
    for tile in (z[:, :20], z[:, 20:23], z[:, 23:]):
        sums.absorb(tile, torch.empty_like(tile))
    torch.testing.assert_close(sums.top + sums.total.log(), z.logsumexp(1), rtol=1e-14, atol=1e-14)
