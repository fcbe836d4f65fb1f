"""The epilogue in plain PyTorch: tiles folded one after the other against the whole row in float64.

tests/kernels and tests/cuda hold the other epilogues to this one.
"""

from __future__ import annotations

import pytest
import torch

from fastalign import reference
from fastalign.ops.head import epilogue
from fastalign.ops.head.epilogue import Coefficients, Sums, pick_rows
from fastalign.ops.head.tiling import START
from fastalign.ops.head.transform import LogitTransform

R, H, V, WIDTH = 5, 4, 23, 9
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(-0.6, None, 1.7),
    "capped": LogitTransform(1.3, 3.0, 0.7),
}
TARGETS = torch.tensor([0, 8, 9, 22, 4])


def problem():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((R, H), (V, H), (V,)))


def fold(h, weight, bias, transform):
    """(logprobs, entropies, stats, d logprob / d h, d entropy / d h), as the driver has them."""
    sums = Sums(*torch.tensor([START, 0.0, 0.0, 0.0], dtype=torch.float64).view(4, 1).repeat(1, R).unbind(0))
    a, b = torch.zeros(R, H, dtype=torch.float64), torch.zeros(R, H, dtype=torch.float64)
    for v0 in range(0, V, WIDTH):
        w = weight[v0 : v0 + WIDTH]
        u = h @ w.T
        e, ze = torch.empty_like(u), torch.empty_like(u)
        epilogue.absorb(
            u, TARGETS, v0, bias[v0 : v0 + WIDTH], transform, sums, entropy=True, e=e, ze=ze, a=a, b=b
        )  # fmt: skip
        a += e @ w
        b += ze @ w
    logprobs, entropies, stats = epilogue.finish(weight, TARGETS, transform, sums, entropy=True, a=a, b=b)
    return logprobs, entropies, stats, a, b


@pytest.mark.parametrize("name", TRANSFORMS)
def test_tiles_add_up_to_the_row(name):
    (h, weight, bias), transform = problem(), TRANSFORMS[name]
    h.requires_grad_()
    logprobs, entropies = reference.linear_logprobs(
        h, weight, TARGETS, bias=bias, entropy=True, **transform._asdict()
    )  # fmt: skip
    (d_logprobs,) = torch.autograd.grad(logprobs.sum(), h, retain_graph=True)
    (d_entropies,) = torch.autograd.grad(entropies.sum(), h)
    found = fold(h.detach(), weight, bias, transform)
    for ours, exact in zip(
        (*found[:2], *found[3:]), (logprobs.detach(), entropies.detach(), d_logprobs, d_entropies), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_gradient_in_a_tiles_products(name):
    (h, weight, bias), transform = problem(), TRANSFORMS[name]
    _, _, stats, *_ = fold(h, weight, bias, transform)
    u = (h @ weight.T).requires_grad_()
    grad = torch.linspace(-1, 2, R, dtype=torch.float64)
    one = torch.eye(V, dtype=torch.float64)
    logprobs = reference.linear_logprobs(u, one, TARGETS, bias=bias, **transform._asdict())
    (exact,) = torch.autograd.grad((grad * logprobs).sum(), u)
    total = stats.others + stats.target
    at_target = grad * stats.others / total * stats.slope
    c = Coefficients(stats.shift, stats.mean, -grad / total, None, at_target)
    for v0 in range(0, V, WIDTH):
        tile = u.detach()[:, v0 : v0 + WIDTH].clone()
        du = torch.empty_like(tile)
        epilogue.softmax_gradient(tile, TARGETS, v0, bias[v0 : v0 + WIDTH], transform, c, du)
        torch.testing.assert_close(du, exact[:, v0 : v0 + WIDTH], rtol=1e-12, atol=1e-14)
    assert c.rows(slice(1, 3)).entropy_factor is None and torch.equal(c.rows(slice(1, 3)).target, at_target[1:3])


def test_a_cached_tile_is_scaled_and_gets_its_target():
    cached, scale, at_target = torch.rand(R, WIDTH), torch.arange(1.0, R + 1), torch.full((R,), 7.0)
    du = torch.empty_like(cached)
    epilogue.kept_gradient(cached, TARGETS, 0, scale, at_target, du)
    expected = cached * scale.unsqueeze(1)
    for row, target in enumerate(TARGETS.tolist()):
        if target < WIDTH:
            expected[row, target] = 7.0
    assert torch.equal(du, expected)


def test_rows_without_gaps_are_picked_in_place():
    weight = torch.randn(V, H)
    assert pick_rows(weight, TARGETS)[0] is weight
    across = weight.T.contiguous().T
    rows, numbers = pick_rows(across, TARGETS)
    assert rows.stride(1) == 1 and torch.equal(rows[numbers], weight[TARGETS])
