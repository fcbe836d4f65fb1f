"""accumulate_fisher_: every backend against the definition in float64, within what rounding explains."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops import accumulate_fisher as module
from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.backends import cpu, pick

BACKENDS = ["cpu", "torch", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Tokens of each sequence: empty, of one token, longer than the kernel's depth of 256, and not from the first token on.
LENGTHS = [0, 1, 5, 64, 300, 0, 2, 523, 0]
SHAPES = [(1, 1), (37, 23), (200, 24), (193, 193), (5, 400), (400, 3)]


def offsets(lengths, first=0):
    return torch.tensor([0, *lengths]).cumsum(0) + first


def operands(out, width, tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(tokens, n, generator=generator, dtype=torch.float64).to(dtype) for n in (out, width))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.rand(out, width, generator=generator).to(wide), g, x


def assert_within_budget(fisher, start, g, x, cu_seqlens):
    """A sum of n products is off by 8 sqrt(n) eps of the sum of their sizes (after Higham and Mary 2019); so is its
    square, twice, and the sum over sequences by another eps for each."""
    exact = reference.accumulate_fisher(start.double(), g.double(), x.double(), cu_seqlens)
    eps = torch.finfo(fisher.dtype).eps
    budget = eps * cu_seqlens.numel() * exact
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        size = g[a:b].double().abs().T @ x[a:b].double().abs()
        gradient = (g[a:b].double().T @ x[a:b].double()).abs()
        off = 8 * math.sqrt(b - a) * eps * size
        budget += 2 * off * gradient + off**2
    assert ((fisher.double() - exact).abs() <= budget).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_budget(backend, dtype, shape):
    cu_seqlens = offsets(LENGTHS, first=3)
    start, g, x = operands(*shape, int(cu_seqlens[-1]) + 2, dtype)
    fisher = start.clone()
    assert accumulate_fisher_(fisher, g, x, cu_seqlens, backend=backend) is fisher
    assert_within_budget(fisher, start, g, x, cu_seqlens)


@pytest.mark.parametrize("isa", cpu.module.available())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    cu_seqlens = offsets(LENGTHS)
    start, g, x = operands(197, 205, int(cu_seqlens[-1]), dtype)
    cpu.select(isa)
    try:
        fisher = accumulate_fisher_(start.clone(), g, x, cu_seqlens, backend="cpu")
    finally:
        cpu.select(None)
    assert_within_budget(fisher, start, g, x, cu_seqlens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_of_one_token(backend):
    cu_seqlens = offsets([1] * 40 + [0], first=2)
    start, g, x = operands(30, 50, 45)
    fisher = accumulate_fisher_(start.clone(), g, x, cu_seqlens, backend=backend)
    assert_within_budget(fisher, start, g, x, cu_seqlens)


def test_a_gpu_is_waited_for_only_under_auto_where_sequences_may_have_a_token_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        few, many = (torch.empty(n + 1, dtype=torch.int64, device="cuda") for n in (39, 40))
    assert module._may_look("cuda", True, 40, many) and module._may_look("triton", True, 40, many)
    assert not module._may_look("cuda", True, 40, few), "some have more than one"
    assert not module._may_look("cuda", False, 40, many), "asked for by name"
    assert module._may_look("torch", False, 40, few) and module._may_look("cuda", False, 40, offsets([40]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not module._may_look("cuda", True, 40, many), "a captured graph cannot wait"


def test_what_auto_looked_at_decides_between_the_squares_and_the_kernel(monkeypatch):
    """As on a GPU: the squares of tokens where each is a sequence, else the kernel that was picked."""
    launched = []

    class Kernels:
        why_not = staticmethod(lambda *tensors: None)
        accumulate_fisher = staticmethod(lambda *operands: launched.append(operands))

    monkeypatch.setitem(pick.KERNELS, "cuda", Kernels)
    monkeypatch.setattr(pick, "pick_gpu_kernels", lambda *tensors, **options: "cuda")
    start, g, x = operands(30, 50, 40)
    fisher = accumulate_fisher_(start.clone(), g, x, offsets([1] * 40))
    assert_within_budget(fisher, start, g, x, offsets([1] * 40))
    assert not launched
    accumulate_fisher_(start.clone(), g, x, offsets([2] + [1] * 38 + [0]))
    assert len(launched) == 1


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    cu_seqlens = offsets(LENGTHS)
    start, g, x = operands(500, 410, int(cu_seqlens[-1]))
    one = accumulate_fisher_(start.clone(), g, x, cu_seqlens, backend="cpu")
    torch.set_num_threads(threads)
    try:
        assert torch.equal(accumulate_fisher_(start.clone(), g, x, cu_seqlens, backend="cpu"), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tensors_and_rows_of_a_larger_fisher(backend):
    cu_seqlens = offsets([7, 9])
    _, g, x = operands(64, 20, 16)
    whole = torch.zeros(64, 50)
    accumulate_fisher_(whole[8:40, 10:20], g[:, 8:40], x[:, ::2], cu_seqlens, backend=backend)
    assert_within_budget(whole[8:40, 10:20], torch.zeros(32, 10), g[:, 8:40], x[:, ::2], cu_seqlens)
    whole[8:40, 10:20] = 0
    assert not whole.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_in_int32(backend):
    cu_seqlens = offsets(LENGTHS)
    start, g, x = operands(20, 30, int(cu_seqlens[-1]))
    found, expected = (
        accumulate_fisher_(start.clone(), g, x, given, backend=backend) for given in (cu_seqlens.int(), cu_seqlens)
    )
    assert torch.equal(found, expected) and not torch.equal(found, start)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_autocast_rounds_nothing(backend):
    cu_seqlens = offsets([7, 9])
    start, g, x = operands(33, 20, 16)
    plain = accumulate_fisher_(start.clone(), g, x, cu_seqlens, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(accumulate_fisher_(start.clone(), g, x, cu_seqlens, backend=backend), plain)


def test_the_torch_backend_tiles_its_rows(monkeypatch):
    monkeypatch.setattr(module, "_TILE_BYTES", 17 * 20 * 4)
    cu_seqlens = offsets([7, 0, 9])
    start, g, x = operands(40, 20, 16)
    fisher = accumulate_fisher_(start.clone(), g, x, cu_seqlens, backend="torch")
    assert_within_budget(fisher, start, g, x, cu_seqlens)


def test_bad_input_is_named():
    fisher, g, x = operands(4, 3, 6)
    cu_seqlens = offsets([2, 4])
    with pytest.raises(InputError, match=r"grad_output \(6, 4\), inputs \(6, 3\), fisher \(3, 4\); they must be"):
        accumulate_fisher_(fisher.T.contiguous(), g, x, cu_seqlens)
    with pytest.raises(InputError, match=r"must be torch.float32 with contiguous rows"):
        accumulate_fisher_(fisher.double(), g, x, cu_seqlens)
    with pytest.raises(InputError, match=r"must be torch.float32 with contiguous rows"):
        accumulate_fisher_(fisher.T.contiguous().T, g, x, cu_seqlens)
    with pytest.raises(InputError, match=r"cu_seqlens is \[0, 2, 7\]...; it must rise within \[0, 6\]"):
        accumulate_fisher_(fisher, g, x, offsets([2, 5]))
    with pytest.raises(InputError, match=r"it must rise"):
        accumulate_fisher_(fisher, g, x, torch.tensor([0, 4, 2]))
    with pytest.raises(InputError, match=r"torch.float32; it must be \(S \+ 1,\) offsets of int64 or int32"):
        accumulate_fisher_(fisher, g, x, cu_seqlens.float())
    with pytest.raises(InputError, match=r"both must be floating"):
        accumulate_fisher_(fisher, g.long(), x, cu_seqlens)
    with pytest.raises(BackendError, match=r"backend is 'tpu'; accumulate_fisher_ has"):
        accumulate_fisher_(fisher, g, x, cu_seqlens, backend="tpu")
