"""segment_sum: the C++, torch and reference backends against exact sums, their gradients and their errors."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import segment_sum
from fastalign.errors import BackendError, InputError

BACKENDS = ["cpu", "torch", "reference"]
# Empty segments first, in the middle and last.
CU_SEQLENS = torch.tensor([0, 0, 3, 4, 4, 4, 500, 1000, 1000])


def values(dtype=torch.float32):
    return torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype, backend):
    v = values(dtype)
    sums = segment_sum(v, CU_SEQLENS, backend=backend)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(sums.dtype).eps
    for i, total in enumerate(sums.tolist()):
        segment = v[CU_SEQLENS[i] : CU_SEQLENS[i + 1]].tolist()
        # n numbers make n - 1 rounded additions; the C++ sum is in float64, rounded once.
        roundings = 1 if backend == "cpu" and dtype != torch.float64 else len(segment)
        assert abs(total - math.fsum(segment)) <= roundings * eps * math.fsum(map(abs, segment))
    assert sums[CU_SEQLENS.diff() == 0].tolist() == [0.0] * 4


def test_native_sums_do_not_lose_small_values():
    v = torch.tensor([1e8] + [1.0] * 100 + [-1e8])  # float32 additions would lose every 1
    assert segment_sum(v, torch.tensor([0, 102]), backend="cpu").item() == 100.0
    assert segment_sum(v, torch.tensor([0, 102])).item() == 100.0  # and "auto" is the native one here


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    v = values(torch.float64)[:9].requires_grad_()
    cu_seqlens = torch.tensor([0, 2, 2, 9])
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, cu_seqlens, backend=backend), v)
    (segment_sum(v, cu_seqlens, backend=backend) * torch.tensor([3.0, 5.0, 7.0])).sum().backward()
    assert v.grad.tolist() == [3.0] * 2 + [7.0] * 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_gets_a_gradient_of_its_own_dtype(backend):
    v = values(torch.bfloat16).requires_grad_()
    segment_sum(v, CU_SEQLENS, backend=backend).sum().backward()
    assert v.grad.dtype == torch.bfloat16 and v.grad.eq(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_segments_no_values_and_strides(backend):
    assert segment_sum(values()[:0], torch.tensor([0]), backend=backend).shape == (0,)
    assert segment_sum(values()[:0], torch.tensor([0, 0, 0]), backend=backend).tolist() == [0.0, 0.0]
    strided, offsets = torch.arange(8.0)[::2], torch.tensor([0, 9, 1, 9, 4, 9])[::2]  # 0 2 4 6 and 0 1 4
    assert segment_sum(strided, offsets, backend=backend).tolist() == [0.0, 12.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_in_int32(backend):
    v = values().requires_grad_()
    found, expected = (segment_sum(v, given, backend=backend) for given in (CU_SEQLENS.int(), CU_SEQLENS))
    assert torch.equal(found, expected)
    (grad,) = torch.autograd.grad(found, v, torch.arange(8.0))
    assert torch.equal(grad, torch.arange(8.0).repeat_interleave(CU_SEQLENS.diff()))


@pytest.mark.parametrize("offsets", [CU_SEQLENS, CU_SEQLENS.int()], ids=["int64", "int32"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compiles_in_one_graph(backend, offsets):
    compiled = torch.compile(lambda v, c: segment_sum(v, c, backend=backend), fullgraph=True, backend="aot_eager")
    v = values().requires_grad_()
    sums = compiled(v, offsets)
    (sums * torch.arange(8)).sum().backward()
    assert torch.equal(sums, segment_sum(v, CU_SEQLENS, backend=backend))
    assert torch.equal(v.grad, torch.arange(8.0).repeat_interleave(CU_SEQLENS.diff()))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck(backend):
    torch.library.opcheck(torch.ops.fastalign.segment_sum.default, (values(), CU_SEQLENS, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("cu_seqlens", "words"),
    [
        ([1, 4], ("[1, 4]", "0 to 4")),
        ([0, 3], ("[0, 3]", "0 to 4")),
        ([0, 5], ("[0, 5]", "0 to 4")),
        ([0, 3, 2, 4], ("[0, 3, 2, 4]", "rise")),
        ([], ("(0,)", "(S + 1,)")),
        ([[0, 4]], ("(1, 2)", "(S + 1,)")),
        ([0.0, 4.0], ("torch.float32", "int64")),
    ],
    ids=str,
)
def test_wrong_offsets(cu_seqlens, words, backend):
    offsets = torch.tensor(cu_seqlens) if cu_seqlens else torch.zeros(0, dtype=torch.int64)
    with pytest.raises(InputError) as error:
        segment_sum(values()[:4], offsets, backend=backend)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_other_errors():
    with pytest.raises(InputError, match=r"\(2, 500\).*\(N,\)"):
        segment_sum(values().view(2, 500), CU_SEQLENS)
    with pytest.raises(InputError, match=r"torch.int64.*floating"):
        segment_sum(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4]))
    with pytest.raises(InputError, match=r"cpu.*meta.*one device"):
        segment_sum(values(), CU_SEQLENS.to("meta"))
    with pytest.raises(BackendError, match=r"'tpu'.*auto, reference, torch, cpu"):
        segment_sum(values(), CU_SEQLENS, backend="tpu")
    with pytest.raises(BackendError, match=r"backend='cpu'.*meta"):
        segment_sum(values().to("meta"), CU_SEQLENS.to("meta"), backend="cpu")
