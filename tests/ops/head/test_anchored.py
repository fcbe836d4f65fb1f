"""The anchored driver's memory, and its coefficients against autograd. Its kernels: tests/kernels/interpreted."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.kernels import anchored_logprobs as kernels
from fastalign.ops.head import anchored
from fastalign.ops.head.transform import LogitTransform


@pytest.mark.parametrize("vocab", [49152, 128256, 151936])
def test_exponentials_stay_within_their_bytes(vocab):
    rows = anchored.block_rows(vocab)
    assert rows % 128 == 0 and rows * anchored.padded_columns(vocab) * 2 <= 256 << 20
    assert (rows + 128) * anchored.padded_columns(vocab) * 2 > 256 << 20
    for n, width in ((64, 0), (16384, 0), (16384, 5120)):
        part = anchored.part_columns(n, width)
        assert part % 256 == 0 and max(n * part * 2, part * width * 4) <= 256 << 20


def test_a_row_of_exponentials_begins_at_a_multiple_of_16_bytes():
    assert [anchored.padded_columns(vocab) for vocab in (1, 8, 49152, 50257)] == [8, 8, 49152, 50264]


def test_what_is_kept():
    bias = torch.zeros(3, requires_grad=True)
    assert anchored.keeps_exponentials(torch.bfloat16, None, entropy=False)
    assert anchored.keeps_exponentials(torch.bfloat16, bias.detach(), entropy=False)
    assert not anchored.keeps_exponentials(torch.bfloat16, bias, entropy=False)
    assert not anchored.keeps_exponentials(torch.bfloat16, None, entropy=True)
    assert not anchored.keeps_exponentials(torch.float16, None, entropy=False)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_coefficients_are_those_of_autograd(softcap):
    transform = LogitTransform(0.7, softcap, 1.3)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, g, g_entropy = torch.tensor([0, 3, 8, 5]), torch.randn(4).double(), torch.randn(4).double()
    z = u * transform.factor if softcap is None else softcap * torch.tanh(u * 0.7 / softcap) / 1.3
    p = z.softmax(1)
    logprobs, entropy = z.log_softmax(1).gather(1, targets[:, None])[:, 0], -(p * p.log()).sum(1)
    (expected,) = torch.autograd.grad((g * logprobs + g_entropy * entropy).sum(), u)
    lse2, doubt = z.logsumexp(1) / math.log(2), 1 - logprobs.exp()
    slope_y = transform.slope(z.gather(1, targets[:, None])[:, 0])
    stats = torch.stack([lse2, torch.ones(4).double(), doubt, slope_y, entropy], 1).detach()
    c = anchored._coefficients(g, g_entropy, stats, transform)
    log2_p = z / math.log(2) - c.lse2[:, None]
    du = log2_p.exp2() * (c.slope_1[:, None] + c.slope_2[:, None] * log2_p) * transform.slope(z) / transform.factor
    du = du.scatter(1, targets[:, None], c.at_target[:, None])
    torch.testing.assert_close(du, expected, rtol=1e-12, atol=1e-12)


class _Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel is launched. Nothing runs, so the numbers mean nothing."""
    counts = collections.Counter()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: counts.update([self.name])

    for name in ("anchor", "scan", "rescue", "finish"):
        monkeypatch.setattr(kernels, name, Kernel(name))
    return counts


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_frozen_layer_takes_four_launches_and_one_product_per_block_of_rows(launches, blocks, monkeypatch):
    monkeypatch.setattr(anchored, "block_rows", lambda vocab: -(-40 // blocks))
    hidden, weight = torch.randn(40, 16).bfloat16(), torch.randn(100, 16).bfloat16()
    with _Products() as products:
        anchored.forward(hidden, weight, torch.arange(40), None, LogitTransform(), grads=True)
    assert products.count == blocks
    assert launches == dict.fromkeys(("anchor", "scan", "rescue", "finish"), blocks)
    launches.clear()
    with _Products() as products:  # without gradients nothing is kept, so all rows are one block
        anchored.forward(hidden, weight, torch.arange(40), None, LogitTransform())
    assert products.count == 0 and launches == dict.fromkeys(("anchor", "scan", "rescue", "finish"), 1)


@pytest.mark.parametrize(("kept", "scans", "count"), [(48, 0, 2), (16, 2, 6), (0, 2, 4)])
def test_a_trainable_layer_takes_one_product_per_gradient_where_exponentials_were_kept(
    launches, kept, scans, count, monkeypatch
):
    """Else one of each, and a scan, for each part of the vocabulary; where some rows were kept their part is added."""
    monkeypatch.setattr(anchored, "part_columns", lambda rows, width: 56)
    hidden, weight = torch.randn(40, 16).bfloat16(), torch.randn(100, 16).bfloat16()
    cache = torch.randn(kept, 104).bfloat16() if kept else None
    with _Products() as products:
        anchored.backward(
            torch.randn(40), None, hidden, weight, torch.arange(40), None, LogitTransform(), torch.rand(40, 5) + 1,
            cache, needs=(True, True, False),
        )  # fmt: skip
    assert launches == ({"scan": scans} if scans else {})
    assert products.count == count + (kept == 16)
