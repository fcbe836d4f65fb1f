"""csrc/cuda/linear_divergence.cu, run on the CPU, against fastalign/ops/head/divergence_terms.py in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fastalign import linear_divergence
from fastalign.ops.head import divergence_terms as definition
from fastalign.ops.head import tiling
from fastalign.ops.head.divergence_terms import DivergenceKind
from fastalign.ops.head.tiling import START
from fastalign.ops.head.transform import LogitTransform

ROWS, COLUMNS = 5, 1043
HEADS = {"plain": LogitTransform(), "scaled": LogitTransform(0.5, None, 0.7), "capped": LogitTransform(1.3, 8.0, 0.7)}
KINDS = [DivergenceKind("forward_kl", 0.0), DivergenceKind("reverse_kl", 0.0), DivergenceKind("jsd", 0.3)]
EPS = torch.finfo(torch.float32).eps


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def rows_apart(values, padding=5):
    out = torch.full((values.shape[0], values.shape[1] + padding), torch.nan)[:, : values.shape[1]]
    return out.copy_(values)


def within_budget(ours, plain, exact, eps=EPS):
    """|ours - exact| <= 2 (|plain - exact| + eps max|exact|)."""
    assert ours.isfinite().all()
    assert (ours - exact).abs().max() <= 2 * ((plain - exact).abs().max() + eps * exact.abs().max())


@pytest.mark.parametrize("head", HEADS)
def test_logits_and_their_sums(cuda, head):
    u, bias, head = rows_apart(random(ROWS, COLUMNS, scale=3.0)), random(COLUMNS, seed=1), HEADS[head]
    if head.softcap is None:
        bias[::7] = -torch.inf
    top, total = torch.tensor([START, 2.0, 40.0, -3.0, 0.0]), torch.tensor([0.0, 2.0, 1.5, 1.0, 7.0])
    z = (u + bias).double() * head.logit_scale
    z = (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)) / head.temperature
    exact = torch.logaddexp(top.double() + total.double().log(), z.logsumexp(1))
    cuda.divergence_normalise(u, bias, head, top, total)
    ruled_out = z.isneginf()
    assert (u[ruled_out] <= START / 2).all() and u[ruled_out].isfinite().all()
    assert ((u - z)[~ruled_out].abs() <= 8 * EPS * (1 + z[~ruled_out].abs())).all()
    assert ((top + total.log() - exact).abs() <= 32 * EPS * (1 + exact.abs())).all()


def held(padding=5, masked=True):
    """Logits of both sides, some ruled out by one side, by the other and by both, and their stats (ROWS, 5)."""
    a = random(ROWS, COLUMNS, scale=3.0)
    b = a + random(ROWS, COLUMNS, seed=1, scale=0.5)
    b[0] = a[0]  # the same: divergence and gradient are 0
    if masked:
        a[1:, ::7] = b[1:, ::7] = START
    stats = torch.zeros(ROWS, 5)
    for i, z in ((0, a), (2, b)):
        stats[:, i] = z.amax(1)
        stats[:, i + 1] = (z.double() - stats[:, i : i + 1]).exp().sum(1).log()
    return rows_apart(a, padding), rows_apart(b, padding), stats


def by_tiles(dtype, a, b, stats, kind, head):
    """(values, moments, gradient) of the plain driver."""
    a, b, stats = a.to(dtype, copy=True).contiguous(), b.to(dtype, copy=True).contiguous(), stats.to(dtype)
    value, moment = definition.terms(a, b, stats, kind, head, (torch.empty_like(a), torch.empty_like(a)))
    moment = torch.zeros_like(value) if moment is None else moment
    return value, moment, definition.gradient(a, b, moment, kind, head)


@pytest.mark.parametrize("head", ["scaled", "capped"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_terms_and_gradient(cuda, dtype, kind, head):
    head = HEADS[head]
    a, b, stats = held(masked=head.softcap is None)
    exact = by_tiles(torch.float64, a, b, stats, kind, head)
    plain = by_tiles(torch.float32, a, b, stats, kind, head)
    values, moments = torch.full((ROWS,), 0.25), torch.full((ROWS,), 0.5)
    cuda.divergence_terms(a, b, stats, kind.name, kind.beta, head, values, moments)
    within_budget(values.double() - 0.25, plain[0], exact[0], 4 * EPS)
    if kind.name != "forward_kl":
        within_budget(moments.double() - 0.5, plain[1], exact[1], 4 * EPS)
    coefficients = random(ROWS, seed=3)
    c = a.view(dtype)[:, :COLUMNS]
    factor = head.factor if head.softcap is None else 1.0
    second = None if kind.name == "forward_kl" else b
    cuda.divergence_gradient(a, second, moments - 0.5, factor * (1 - kind.beta), coefficients, c)
    scale = coefficients.double().unsqueeze(1)
    within_budget(c.double(), plain[2].double() * scale, exact[2] * scale, torch.finfo(dtype).eps)
    assert not c[0].any() and abs(values[0] - 0.25) < 1e-7


def test_what_one_side_rules_out_is_beyond_any_divergence(cuda):
    a, b, stats = held()
    a[2, 3] = START
    values, moments = torch.zeros(2, ROWS)
    cuda.divergence_terms(a, b, stats, "forward_kl", 0.0, LogitTransform(), values, moments)
    assert values[2] > definition.RULED_OUT and values[1] < definition.RULED_OUT


# The whole op: the tests of backend "torch", with its budgets, on backend "cuda".


def shared_tests():
    path = Path(__file__).parents[1] / "ops" / "test_linear_divergence.py"
    spec = importlib.util.spec_from_file_location("torch_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The functions there name backend "torch".
    module.linear_divergence = lambda *args, **options: linear_divergence(*args, **options | {"backend": "cuda"})
    return module


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("frozen", torch.float32), ("trainable", torch.bfloat16), ("weighted", torch.float32)],
    ids=str,
)
def test_op_within_the_error_budget(cuda, mode, dtype, kind, monkeypatch):
    monkeypatch.setattr(tiling, "divergence_tile_shape", lambda device: (16, 32))
    shared = shared_tests()
    option = {"forward_kl": "plain", "reverse_kl": "scaled", "jsd": "capped"}[kind]
    shared.check_against_float64(
        shared.problem(dtype, n=21, bias=True), mode, divergence=kind, **shared.OPTIONS[option]
    )
