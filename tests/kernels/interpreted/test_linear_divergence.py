"""The epilogue of linear_divergence in Triton against its definition in torch, in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fastalign import linear_divergence
from fastalign.kernels import linear_divergence as kernels
from fastalign.ops.head import divergence_terms as definition
from fastalign.ops.head import tiling
from fastalign.ops.head.tiling import START
from fastalign.ops.head.transform import LogitTransform

EPS = torch.finfo(torch.float32).eps
R, T = 5, 37
HEADS = {"plain": LogitTransform(), "scaled": LogitTransform(-0.6, None, 1.7), "softcap": LogitTransform(0.8, 3.0, 0.7)}
KINDS = ["forward_kl", "reverse_kl", "jsd"]


def logits(seed=0, spread=2.0, columns=T):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(R, columns, generator=generator) * spread


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("head", HEADS)
def test_normalise(head, with_bias):
    head, top, total = HEADS[head], torch.full((R,), START), torch.zeros(R)
    seen = []
    for seed in range(3):  # the maximum rises, falls, rises
        u = logits(seed) + (0, -40, 5)[seed]
        bias = torch.linspace(-1, 1, T) if with_bias else None
        if with_bias and head.factor > 0:
            bias[3] = -torch.inf
        wide = u.double() if bias is None else (u.double() + bias.double()).clamp(min=START)
        if head.softcap is None:
            seen.append(wide * head.factor)
        else:
            seen.append((wide * (head.logit_scale / head.softcap)).tanh() * (head.softcap / head.temperature))
        memory = torch.full((R, T + 3), 1e9)
        memory[:, :T] = u
        kernels.normalise(memory[:, :T], bias, head, top, total)
        finite = seen[-1] > -1e20
        assert ((memory[:, :T] - seen[-1]).abs()[finite] <= 8 * EPS * seen[-1].abs().clamp(min=1)[finite]).all()
        assert (memory[:, T:] == 1e9).all()
    exact = torch.cat(seen, 1)
    assert ((top - exact.amax(1)).abs() <= 8 * EPS * exact.amax(1).abs().clamp(min=1)).all()
    assert ((top.double() + total.double().log() - exact.logsumexp(1)).abs() <= 200 * EPS).all()


def both_sides(apart, head):
    """Logits within the cap, and the statistics of their softmax over this tile and some more."""
    a = logits(0)
    b = a + apart * logits(1)
    if head.softcap is not None:
        a, b = (torch.tanh(z) * (head.softcap / head.temperature) for z in (a, b))
    a[0, 3], b[1, 4], a[2, 5], b[2, 5] = (START,) * 4  # ruled out by one side, and by both
    stats = torch.zeros(R, 5)
    stats[:, 0], stats[:, 2] = a.amax(1), b.amax(1)
    stats[:, 1], stats[:, 3] = ((z - z.amax(1, keepdim=True)).exp().sum(1).add(0.3).log() for z in (a, b))
    return a, b, stats


@pytest.mark.parametrize("apart", [1.0, 1e-3], ids=["apart", "near"])
@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.parametrize("kind", KINDS)
def test_terms_and_gradient(kind, head, apart):
    head, beta = HEADS[head], 0.3
    a, b, stats = both_sides(apart, head)
    values, moments = torch.linspace(0, 1, R), torch.linspace(-1, 0, R)
    divergence = definition.DivergenceKind(kind, beta)
    exact = [t.double() for t in (a, b)]
    scratch = [torch.empty(R, T, dtype=torch.float64) for _ in range(2)]
    value, moment = definition.terms(*exact, stats.double(), divergence, head, scratch)
    want_values = values.double() + value
    want_moments = moments.double() + (0.0 if moment is None else moment)
    kernels.terms(a, b, stats, kind, beta, head, values, moments)
    off = 200 * EPS * (1.0 if apart == 1.0 else 1e-3)  # of a small divergence, digits must not be lost to rounding
    finite = want_values < 1e20
    assert ((values - want_values).abs()[finite] <= off + 2 * EPS * want_values.abs()[finite]).all()
    assert (values[~finite] > definition.RULED_OUT).all() and torch.equal(finite, values < definition.RULED_OUT)
    assert ((moments - want_moments).abs()[finite] <= 200 * EPS).all()

    want = definition.gradient(*exact, want_moments, divergence, head)
    coefficients = torch.linspace(1, 2, R)
    for dtype in (torch.float32, torch.bfloat16):
        left, right = a.clone(), None if kind == "forward_kl" else b.clone()
        out = left.view(dtype)[:, :T] if dtype != torch.float32 else left
        kernels.gradient(left, right, moments, definition.gradient_scale(divergence, head), coefficients, out)
        exact_c = want * coefficients.double().unsqueeze(1)
        budget = (off + torch.finfo(dtype).eps) * exact_c.abs().amax(1, keepdim=True) + off
        assert ((out.double() - exact_c).abs() <= budget)[finite].all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_on_both_sides_are_exactly_nothing(kind):
    a, _, stats = both_sides(0.0, LogitTransform())
    a[2, 5] = 0.0
    stats[:, 2:4] = stats[:, :2]
    b, values, moments = a.clone(), torch.zeros(R), torch.zeros(R)
    kernels.terms(a, b, stats, kind, 0.5, LogitTransform(), values, moments)
    out = torch.empty(R, T)
    kernels.gradient(a, None if kind == "forward_kl" else b, moments, 1.0, None, out)
    assert not values.any() and not moments.any() and not out.any()


# The whole op: the tests of backend "torch", with its budgets, on backend "triton".


def shared_tests():
    path = Path(__file__).parents[2] / "ops" / "test_linear_divergence.py"
    spec = importlib.util.spec_from_file_location("torch_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The functions there name backend "torch".
    module.linear_divergence = lambda *args, **options: linear_divergence(*args, **options | {"backend": "triton"})
    return module


shared = shared_tests()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("frozen", torch.float32), ("trainable", torch.bfloat16), ("weighted", torch.float32)],
    ids=str,
)
def test_op_within_the_error_budget(mode, dtype, kind, monkeypatch):
    monkeypatch.setattr(tiling, "divergence_tile_shape", lambda device: (16, 32))
    option = {"forward_kl": "plain", "reverse_kl": "scaled", "jsd": "capped"}[kind]
    inputs = shared.problem(dtype, n=11, bias=True)
    shared.check_against_float64(inputs, mode, divergence=kind, **shared.OPTIONS[option])
