"""What the tiled driver of linear_divergence costs, counted on its own products and on its own allocations."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastalign import linear_divergence, reference
from fastalign.ops.head import divergence_tiles, tiling
from fastalign.ops.head.divergence_terms import DivergenceKind
from fastalign.ops.head.transform import LogitTransform

N, H, V, G = 48, 8, 40, 12
U, T = 2 * N * V * H, 2 * N * V * G


def _addmm_flop(acc_shape, a_shape, b_shape, *args, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@pytest.fixture
def products(monkeypatch):
    """FLOP of the matrix products that the driver really runs, in order of the calls; see test_logprobs_tiles.py."""
    counts = []

    def counted(function):
        def run(*args, **kwargs):
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as counter:
                out = function(*args, **kwargs)
            counts.append(counter.get_total_flops())
            return out

        return run

    monkeypatch.setattr(tiling, "divergence_tile_shape", lambda device: (16, 16))
    monkeypatch.setattr(divergence_tiles, "forward", counted(divergence_tiles.forward))
    monkeypatch.setattr(divergence_tiles, "backward", counted(divergence_tiles.backward))
    return counts


def inputs(n=N, vocab=V, dtype=torch.float32):
    shapes = {"hidden": (n, H), "weight": (vocab, H), "teacher_hidden": (n, G), "teacher_weight": (vocab, G)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", reference.DIVERGENCES)
@pytest.mark.parametrize(
    ("leaves", "weights", "forward", "backward"),
    [
        ("", False, U + T, 0),
        ("hidden", False, 2 * U + T, 0),  # a frozen head: nothing but a row scale in backward
        ("hidden", True, 2 * U + T, 0),
        ("hidden weight", True, 3 * U + T, 0),  # the coefficients are known in advance
        ("hidden weight", False, 2 * U + T, 2 * U + T),
        ("hidden bias", False, 2 * U + T, U + T),
        ("weight", True, 2 * U + T, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_that_the_docstring_states(dtype, leaves, weights, forward, backward, kind, products):
    tensors = inputs(dtype=dtype) | {"bias": torch.zeros(V)}
    for name in leaves.split():
        tensors[name].requires_grad_()
    weights = torch.ones(N) if weights else None
    with FlopCounterMode(display=False) as declared:
        out = linear_divergence(**tensors, token_weights=weights, divergence=kind, backend="torch")
        if leaves:
            out.sum().backward()
    assert sum(products) == forward + backward and products[0] == forward
    assert declared.get_total_flops() == forward + backward


@pytest.mark.parametrize("weights", [False, True], ids=["masked", "weighted"])
def test_rows_that_do_not_count_are_dropped_before_any_product(weights, products):
    tensors, kept = inputs(), torch.arange(N) % 3 == 0
    tensors["hidden"].requires_grad_()
    kept = {"token_weights": kept.float()} if weights else {"mask": kept}
    linear_divergence(**tensors, **kept, backend="torch").sum().backward()
    assert products == [(2 * U + T) / 3]


class Allocations(TorchDispatchMode):
    """The most bytes that new tensors hold at once: counted where they are made, taken off where they are freed."""

    def __init__(self, given):
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given}
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage())._cdata not in self.given:
                self.live[storage._cdata] = (storage._weak_ref(), storage.nbytes())
        self.live = {k: v for k, v in self.live.items() if not torch.UntypedStorage._expired(v[0])}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def peak(vocab: int, trainable: bool, n=256, **options) -> int:
    tensors = inputs(n, vocab)
    student, teacher = (
        divergence_tiles.Side(tensors[f"{of}hidden"], tensors[f"{of}weight"], None, LogitTransform())
        for of in ("", "teacher_")
    )
    kind, budget = DivergenceKind("jsd", 0.5), 1 << 22
    with Allocations(tensors.values()) as allocations:
        out = divergence_tiles.forward(student, teacher, kind, grads=True, budget=budget)
        if trainable:
            divergence_tiles.backward(torch.ones(n), student, teacher, kind, out.stats, needs=(True, False))
    return allocations.peak


@pytest.mark.parametrize("trainable", [False, True])
def test_extra_memory_does_not_grow_with_the_vocabulary(trainable):
    """Held logits, scratch and results; a trainable head's gradient, H float32 an entry, is a result."""
    at = {v: peak(v, trainable) - trainable * v * H * 4 for v in (2_048, 8_192, 32_768)}
    tile = 256 * tiling.divergence_tile_shape(torch.device("cpu"))[1] * 4
    assert all(extra <= (1 << 22) + (6 if trainable else 3) * tile for extra in at.values()), at
    assert at[32_768] <= at[8_192] + tile / 2


def test_the_smallest_budget_still_holds_sixteen_rows(products):
    tensors = inputs()
    rows = divergence_tiles.block_rows(N, V, 4, 0, torch.device("cpu"))
    assert rows == 16
    linear_divergence(**tensors, memory_budget=0, backend="torch")
    assert products == [U + T]
