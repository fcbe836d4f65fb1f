"""Every op launches what bench/harness/model.py states, no more: counted on the emulation, forward and backward."""

from __future__ import annotations

import pytest
import torch

from bench.harness import model
from fastalign import linear_divergence, linear_logprobs, preference_loss, selective_logprobs
from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.backends import pick
from fastalign.ops.ewc import ewc_penalty
from fastalign.ops.head import divergence_tiles, tiling

N, H, G, V, TILE = 48, 8, 4, 72, (32, 32)


@pytest.fixture
def launches(cuda, emulated, monkeypatch):
    """A function that runs one and says how many kernels that launched."""
    monkeypatch.setattr(tiling, "logprobs_tile_shape", lambda device: TILE)
    monkeypatch.setattr(tiling, "divergence_tile_shape", lambda device: TILE)

    def count(run):
        before = emulated.launches()
        out = run()
        return out, emulated.launches() - before

    return count


def kernels(steps: dict[str, model.Step]) -> int:
    """Launches of our own: products are the vendor's."""
    return sum(step.calls for step in steps.values() if not step.flop)


@pytest.mark.parametrize("mode", model.MODES)
def test_linear_logprobs(launches, mode):
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=mode != "frozen")
    budget = 0 if mode == "recomputed" else None
    out, forward = launches(
        lambda: linear_logprobs(hidden, weight, torch.arange(N), memory_budget=budget, backend="cuda")
    )
    _, backward = launches(out.sum().backward)
    assert [forward, backward] == [kernels(steps) for steps in model.linear_logprobs(N, H, V, TILE, mode)]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_linear_divergence(launches, kind):
    hidden = torch.randn(N, H, requires_grad=True)
    rows = divergence_tiles.block_rows(N, V, 4, 1 << 30, hidden.device)
    out, forward = launches(
        lambda: linear_divergence(
            hidden, torch.randn(V, H), torch.randn(N, G), torch.randn(V, G), divergence=kind, backend="cuda"
        )
    )
    _, backward = launches(out.sum().backward)
    assert (forward, backward) == (kernels(model.linear_divergence(N, H, G, V, (rows, TILE[1]), kind)), 0)


def test_selective_logprobs(launches):
    logits = torch.randn(N, V, requires_grad=True)
    out, forward = launches(lambda: selective_logprobs(logits, torch.arange(N), backend="cuda"))
    _, backward = launches(out.sum().backward)
    assert [forward, backward] == [step.calls for step in model.selective_logprobs(N, V)]


def test_preference_loss(launches):
    logprobs = torch.randn(9, requires_grad=True)
    out, forward = launches(
        lambda: preference_loss(logprobs, torch.tensor([0, 2, 5, 8, 9]), loss_type="cpo", backend="cuda")
    )
    _, backward = launches(out.losses.sum().backward)
    assert [forward, backward] == [step.calls for step in model.preference_loss(9)]


def test_accumulate_fisher(launches):
    operands = torch.ones(9, 5), torch.ones(9, 7)
    run = launches(lambda: accumulate_fisher_(torch.zeros(5, 7), *operands, torch.tensor([0, 4, 9]), backend="cuda"))
    assert run[1] == model.accumulate_fisher(9, 5, 7).calls


OPS = {
    "linear_logprobs": lambda: linear_logprobs(torch.randn(N, H), torch.randn(V, H), torch.arange(N)),
    "linear_divergence": lambda: linear_divergence(*(torch.randn(rows, H) for rows in (N, V, N, V))),
    "selective_logprobs": lambda: selective_logprobs(torch.randn(N, V), torch.arange(N)),
    "preference_loss": lambda: preference_loss(torch.randn(4), torch.tensor([0, 2, 4]), loss_type="cpo"),
    "accumulate_fisher_": lambda: accumulate_fisher_(
        torch.zeros(5, 7), torch.ones(9, 5), torch.ones(9, 7), torch.tensor([0, 4, 9])
    ),
    "ewc_penalty": lambda: ewc_penalty([torch.randn(3, 4)], [torch.randn(3, 4)], [torch.rand(3, 4)]),
}


@pytest.mark.parametrize("op", OPS)
def test_auto_asks_which_kernels_a_gpu_has(op, launches, monkeypatch):
    assert launches(OPS[op])[1] == 0  # on the CPU there are others
    monkeypatch.setattr(pick, "pick_gpu_kernels", lambda *tensors, **options: "cuda")
    assert launches(OPS[op])[1] > 0
