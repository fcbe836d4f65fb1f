"""The driver's own calls, FLOP and bytes, counted, against the statement that predictions are made from."""

from __future__ import annotations

import pytest
import torch

from bench.harness import model
from fastalign import linear_logprobs
from fastalign.ops.head import divergence_tiles, logprobs_tiles, tiling
from fastalign.ops.head.divergence_terms import DivergenceKind
from fastalign.ops.head.epilogue import TORCH
from fastalign.ops.head.products import accumulate as add_product
from fastalign.ops.head.products import product_into
from fastalign.ops.head.transform import LogitTransform

N, H, V, TILE = 48, 8, 72, (32, 32)


def size(*tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.fixture
def counted(monkeypatch):
    """Steps by name, as the driver really takes them; a list that a pass appends to."""
    passes = []

    def count(name, flop=0, operands=0, tile=0):
        calls, *sums = passes[-1].get(name, (0, 0, 0, 0))
        passes[-1][name] = model.Step(calls + 1, *(x + y for x, y in zip(sums, (flop, operands, tile), strict=True)))

    def product(a, b, out):
        count("logits", 2 * a.shape[0] * a.shape[1] * b.shape[1], size(a, b), size(out))
        return original["product"](a, b, out)

    def accumulate(acc, a, b):
        name = "fold" if acc.shape[0] == a.shape[0] and a.stride(1) == 1 else "weight"
        count(name, 2 * a.shape[0] * a.shape[1] * b.shape[1], size(b) + 2 * size(acc), size(a))
        return original["accumulate"](acc, a, b)

    def absorb(u, *args, e=None, **options):
        kept = e is not None and e.untyped_storage().data_ptr() != u.untyped_storage().data_ptr()
        count("absorb", 0, size(e) if kept else 0, size(u) + (0 if kept else size(e)))
        return TORCH.absorb(u, *args, e=e, **options)

    def finish(weight, targets, head, sums, *, a=None, **options):
        count("finish", 0, 0 if a is None else 2 * size(a) + len(a) * size(weight[0]))
        return TORCH.finish(weight, targets, head, sums, a=a, **options)

    def softmax_gradient(u, *args):
        count("softmax_gradient", 0, 0, size(u, args[-1]))
        return TORCH.softmax_gradient(u, *args)

    def kept_gradient(kept, *args):
        count("kept_gradient", 0, size(kept), size(args[-1]))
        return TORCH.kept_gradient(kept, *args)

    def recorded(function):
        def run(*args, **options):
            passes.append({})
            options["epilogue"] = TORCH._replace(  # tiles are handed over as to a GPU's kernels
                absorb=absorb, finish=finish, softmax_gradient=softmax_gradient, kept_gradient=kept_gradient,
                low_precision=True,
            )  # fmt: skip
            return function(*args, **options)

        return run

    original = {"product": product_into, "accumulate": add_product}
    monkeypatch.setattr(tiling, "logprobs_tile_shape", lambda device: TILE)
    monkeypatch.setattr(logprobs_tiles, "product_into", product)
    monkeypatch.setattr(logprobs_tiles, "accumulate", accumulate)
    monkeypatch.setattr(logprobs_tiles, "forward", recorded(logprobs_tiles.forward))
    monkeypatch.setattr(logprobs_tiles, "backward", recorded(logprobs_tiles.backward))
    return passes


@pytest.mark.parametrize("mode", model.MODES)
def test_the_driver_does_what_is_stated(mode, counted):
    hidden = torch.randn(N, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=mode != "frozen")
    budget = 0 if mode == "recomputed" else None
    linear_logprobs(hidden, weight, torch.arange(N), memory_budget=budget, backend="torch").sum().backward()
    forward, backward = model.linear_logprobs(N, H, V, TILE, mode, element=4)
    assert counted == ([forward, backward] if backward else [forward])


@pytest.mark.parametrize(("mode", "products", "reads"), [("frozen", 2, 1), ("cached", 3, 2), ("recomputed", 4, 3)])
def test_the_anchored_driver_writes_exponentials_once_and_no_float32_logits(mode, products, reads):
    n, h, v = 1024, 4096, 128256
    steps = [step for steps in model.anchored_logprobs(n, h, v, mode) for step in steps.values()]
    assert sum(step.flop for step in steps) == products * 2 * n * v * h
    moved = sum(step.tiles for step in steps)
    assert moved == (1 + reads) * 2 * n * v + 4 * n * 501 - (2 * n * v if mode == "recomputed" else 0)
    tiled = [step for steps in model.linear_logprobs(n, h, v, (2048, 16384), mode) for step in steps.values()]
    assert moved < 0.5 * sum(step.tiles + step.operands for step in tiled if step.tiles)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_driver_of_divergences_does_what_is_stated(kind, monkeypatch):
    """Its products and tiles are counted; what an epilogue leaves in them does not matter here."""
    steps, teacher_width = {}, 5

    def count(name, flop=0, operands=0):
        old = steps.get(name, model.Step(0))
        steps[name] = model.Step(old.calls + 1, old.flop + flop, old.operands + operands)

    def multiply(side, v0, v1, out):
        w = side.weight[v0:v1]
        name = "student" if w.shape[1] == H else "teacher"
        count(name, 2 * side.hidden.shape[0] * w.shape[0] * w.shape[1], size(side.hidden, w, out))
        return out

    def accumulate(acc, a, b):
        count("fold", 2 * a.shape[0] * a.shape[1] * b.shape[1], size(a, b) + 2 * size(acc))

    def terms(a, b, *_):
        count("terms", 0, size(a, b) + size(a, None if kind == "forward_kl" else b))

    epilogue = divergence_tiles.DivergenceEpilogue(
        lambda z, *_: count("normalise", 0, 2 * size(z)), terms,
        lambda a, b, moments, scale, coefficients, out: count("gradient", 0, size(a, b, out)),
    )  # fmt: skip
    monkeypatch.setattr(tiling, "divergence_tile_shape", lambda device: TILE)
    monkeypatch.setattr(divergence_tiles, "multiply", multiply)
    monkeypatch.setattr(divergence_tiles, "accumulate", accumulate)
    student, teacher = (
        divergence_tiles.Side(torch.zeros(N, width), torch.zeros(V, width), None, LogitTransform())
        for width in (H, teacher_width)
    )
    divergence_tiles.forward(student, teacher, DivergenceKind(kind, 0.5), grads=True, budget=1 << 30, epilogue=epilogue)
    rows = divergence_tiles.block_rows(N, V, 4, 1 << 30, torch.device("cpu"))
    assert steps == model.linear_divergence(N, H, teacher_width, V, (rows, TILE[1]), kind, element=4)


def test_flop_of_each_mode_in_products():
    u = 2 * N * H * V
    for mode, expected in zip(model.MODES, (2, 3, 4), strict=True):
        passes = model.linear_logprobs(N, H, V, TILE, mode)
        assert sum(step.flop for steps in passes for step in steps.values()) == expected * u


def test_a_step_takes_as_long_as_its_slowest_part():
    device = model.Device("a round one", 100 / model.PRODUCT_SHARE, 10.0, 16 << 30)
    assert model.seconds(model.Step(0, 400, 10, 10), device) == pytest.approx(4.0)
    assert model.seconds(model.Step(0, 100, 20, 10), device) == pytest.approx(3.0)
    assert model.seconds(model.Step(0, 100, 0, 100), device) == pytest.approx(10.0)
    assert model.seconds(model.Step(5, 100), device) == pytest.approx(1.0 + 5 * model.GAP)


@pytest.mark.parametrize("name", model.DEVICES)
def test_the_table_says_that_it_predicts_and_names_who_published(name):
    text = model.table(name)
    assert text.startswith("PREDICTIONS for") and "not measurements" in text.splitlines()[0]
    assert "104.8 ms (Liger" in text and "42.0 ms (TRL" in text
    assert text.count("| frozen |") == text.count("| recomputed |") == 2


def test_three_products_at_the_published_shape_take_what_was_published():
    """The one figure that the model is fitted to."""
    three = 3 * model.seconds(model.Step(1, 2 * 8192 * 4096 * 151936), model.DEVICES["h100"])
    assert three == pytest.approx(42e-3, rel=0.02)
