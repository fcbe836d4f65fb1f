"""What the tiled driver of linear_logprobs costs, counted on its own products and measured on the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastalign import linear_logprobs
from fastalign.ops.head import logprobs_tiles, tiling

N, H, V = 48, 8, 40
U = 2 * N * V * H
ROW_BYTES = V * 4


def _addmm_flop(acc_shape, a_shape, b_shape, *args, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@pytest.fixture
def products(monkeypatch):
    """FLOP of the matrix products that `tiles.forward` and `tiles.backward` really run, in the order of the calls.

    The op's own formula, which a FlopCounterMode around the op reads, only declares them. The counter does not know
    the in-place addmm_ by itself.
    """
    counts = []

    def counted(function):
        def run(*args, **kwargs):
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as counter:
                out = function(*args, **kwargs)
            counts.append(counter.get_total_flops())
            return out

        return run

    monkeypatch.setattr(tiling, "logprobs_tile_shape", lambda device: (16, 16))
    monkeypatch.setattr(logprobs_tiles, "forward", counted(logprobs_tiles.forward))
    monkeypatch.setattr(logprobs_tiles, "backward", counted(logprobs_tiles.backward))
    return counts


@pytest.mark.parametrize(
    ("trainable", "entropy", "memory_budget", "forward", "backward"),
    [
        ("", False, None, 2, 0),  # frozen: nothing but a row scale in backward
        ("", True, None, 3, 0),
        ("weight", False, None, 1, 2),  # all tiles kept
        ("weight bias", False, None, 1, 2),
        ("weight", False, N * ROW_BYTES, 1, 2),
        ("weight", False, N // 3 * ROW_BYTES, 1, 2 + 2 / 3),  # a third of them
        ("weight", False, N // 3 * ROW_BYTES - 1, 1, 3),
        ("weight", False, 0, 1, 3),  # none
        ("weight", True, None, 1, 3),  # the entropy always recomputes
        ("bias", False, 0, 1, 2),  # one product for hidden, one for the logits
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flop_are_2u_frozen_3u_cached_4u_recomputed(
    dtype, trainable, entropy, memory_budget, forward, backward, products
):
    if memory_budget is not None:
        memory_budget = memory_budget * torch.finfo(dtype).bits // 32
    hidden, weight, bias = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype), torch.zeros(V, dtype=dtype)
    hidden.requires_grad_(), weight.requires_grad_("weight" in trainable), bias.requires_grad_("bias" in trainable)
    with FlopCounterMode(display=False) as declared:
        out = linear_logprobs(
            hidden, weight, torch.arange(N) % V, bias=bias, entropy=entropy, memory_budget=memory_budget,
            backend="torch",
        )  # fmt: skip
        sum(t.sum() for t in (out if entropy else (out,))).backward()
    assert products == [forward * U, backward * U][: 1 + bool(trainable)]
    assert declared.get_total_flops() == (forward + backward) * U


@pytest.mark.parametrize("trainable", [False, True])
def test_ignored_rows_are_dropped_before_any_product(trainable, products):
    targets = torch.full((N,), -100)
    targets[::3] = 1
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=trainable)
    linear_logprobs(hidden, weight, targets, backend="torch").sum().backward()
    assert products == ([U / 3, 2 * U / 3] if trainable else [2 * U / 3])


def test_without_gradients_one_product_is_enough(products):
    with torch.no_grad():
        linear_logprobs(torch.randn(N, H), torch.randn(V, H), torch.zeros(N, dtype=torch.long), entropy=True,
                        backend="torch")  # fmt: skip
    assert products == [U]


# Run in a process of its own, whose peak is not another test's: the extra bytes of one forward and backward pass.
MEASURE = """
import json, sys, torch
from fastalign import linear_logprobs
torch.set_num_threads(1)
N, H = 256, 32

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def extra(vocab, trainable, backend):
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(vocab, H, requires_grad=trainable)
    if trainable:
        weight.grad = torch.ones(vocab, H)  # the result itself is not extra
    targets = torch.randint(vocab, (N,))
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM from here on
    before = status("VmRSS")
    linear_logprobs(hidden, weight, targets, memory_budget=0, backend=backend).sum().backward()
    return status("VmHWM") - before

extra(2000, True, "torch"), extra(2000, False, "torch")  # what the first call alone loads
print(json.dumps({
    f"{backend} {trainable}": [extra(vocab, trainable, backend) for vocab in (8_000, 32_000, 128_000)]
    for backend in ("torch", "reference") for trainable in (False, True)
}))
"""


def test_extra_memory_does_not_grow_with_the_vocabulary():
    # Freed tiles go back to the system at once, so that one measurement leaves the next nothing to reuse.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    extra = json.loads(run.stdout)
    tile = 256 * tiling.logprobs_tile_shape(torch.device("cpu"))[1] * 4
    frozen, trainable = extra["torch False"], extra["torch True"]
    # The weight's gradient is made beside the one it is added to: 32 float32 a vocabulary entry, and no more.
    trainable = [extra - vocab * 32 * 4 for extra, vocab in zip(trainable, (8_000, 32_000, 128_000), strict=True)]
    for at_8k, at_32k, at_128k in (frozen, trainable):
        assert max(at_8k, at_32k, at_128k) <= 4 * tile
        assert at_128k - at_8k <= tile / 2
    assert extra["reference False"][2] >= 256 * 128_000 * 4  # the measurement sees logits where there are some
