"""Which backend runs each op, and what is said where the one that was asked for cannot: what is missing, the remedy."""

from __future__ import annotations

import pytest
import torch

from fastalign import (
    linear_divergence,
    linear_logprobs,
    preference_loss,
    segment_sum,
    selective_logprobs,
    sparse_divergence,
)
from fastalign.errors import BackendError, InputError
from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.backends import cpu, cuda, pick, triton
from fastalign.ops.ewc import ewc_penalty


def matrix(rows, columns, device="cpu"):
    return torch.ones(rows, columns, device=device)


def whole(*values):
    return torch.tensor(values)


# Each op with tensors that fit; `other` is where the one lies that could be left behind.
CALLS = {
    "linear_logprobs": lambda other="cpu", **options: linear_logprobs(
        matrix(3, 4), matrix(5, 4, other), whole(0, 1, 2), **options
    ),
    "selective_logprobs": lambda other="cpu", **options: selective_logprobs(
        matrix(3, 5), whole(0, 1, 2).to(other), **options
    ),
    "linear_divergence": lambda other="cpu", **options: linear_divergence(
        matrix(3, 4), matrix(5, 4), matrix(3, 2), matrix(5, 2, other), **options
    ),
    "preference_loss": lambda other="cpu", **options: preference_loss(
        torch.zeros(4), whole(0, 2, 4).to(other), loss_type="cpo", **options
    ),
    "accumulate_fisher_": lambda other="cpu", **options: accumulate_fisher_(
        matrix(2, 3), matrix(4, 2), matrix(4, 3, other), whole(0, 4), **options
    ),
    "ewc_penalty": lambda other="cpu", **options: ewc_penalty([matrix(2, 3)], [matrix(2, 3, other)], None, **options),
}


@pytest.mark.parametrize("op", CALLS)
def test_the_cuda_kernels_are_not_built(op, monkeypatch):
    monkeypatch.setattr(cuda, "module", None)
    with pytest.raises(BackendError, match=rf"backend='cuda' cannot run {op} here: .*install nvcc .*`make build`"):
        CALLS[op](backend="cuda")


@pytest.mark.parametrize("op", CALLS)
def test_triton_is_not_installed(op, monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=rf"backend='triton' cannot run {op} here: .*pip install triton"):
        CALLS[op](backend="triton")


@pytest.mark.parametrize("op", CALLS)
def test_triton_is_there_but_no_gpu(op):
    with pytest.raises(BackendError, match=rf"{op} here: a tensor lies on cpu, .* on cuda; TRITON_INTERPRET=1"):
        CALLS[op](backend="triton")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", CALLS)
def test_tensors_on_different_devices(op, backend):
    with pytest.raises(InputError, match=r"device|lies on|is .* on "):
        CALLS[op]("meta", backend=backend)


def test_kernels_are_not_launched_across_devices(monkeypatch):
    class Built:
        device_type = "cuda"

    monkeypatch.setattr(cuda, "module", Built)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        apart = torch.empty(2, device="cuda:0"), None, torch.empty(2, device="cuda:1")
    for backend in (cuda, triton):
        assert backend.why_not(*apart) == "tensors lie on ['cuda:0', 'cuda:1']; move them to one device"
        assert backend.why_not(apart[0], apart[0]) is None


def test_auto_on_a_gpu_takes_the_kernels_that_are_there(monkeypatch):
    class Built:
        device_type = "cuda"

    def tensor(device="cuda"):
        return torch.empty(2, device=device)

    monkeypatch.setattr(triton, "why_not", lambda *tensors: None)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        monkeypatch.setattr(cuda, "module", Built)
        assert pick.resolve("op", "auto", tensor(), None, tensor()) == "cuda"
        assert pick.resolve("op", "auto", tensor(), None, tensor(), prefer=("triton",)) == "triton"
        assert pick.resolve("op", "auto", tensor(), backends=("auto", "torch", "triton")) == "triton"
        assert pick.resolve("op", "auto", tensor(), why_not=lambda name: "no" if name == "cuda" else None) == "triton"
        assert pick.pick_gpu_kernels(tensor("cpu")) is None
        monkeypatch.setattr(cuda, "module", None)
        assert pick.resolve("op", "auto", tensor()) == "triton"
        monkeypatch.setattr(triton, "why_not", lambda *tensors: "no")
        assert pick.resolve("op", "auto", tensor()) == "torch"
        monkeypatch.setattr(cuda, "module", Built)
        assert pick.resolve("op", "auto", tensor(), prefer=("triton",)) == "cuda"


@pytest.mark.parametrize("op", CALLS)
def test_auto_prefers_the_anchored_driver_for_log_probs_and_cuda_for_the_rest(op, monkeypatch):
    asked = []
    monkeypatch.setattr(pick, "pick_gpu_kernels", lambda *tensors, prefer, **options: asked.append(prefer))
    CALLS[op]()
    assert asked == [("anchored", "triton") if op == "linear_logprobs" else ("cuda",)]


ON_THE_CPU = CALLS | {
    "segment_sum": lambda **options: segment_sum(torch.zeros(4), whole(0, 4), **options),
    "sparse_divergence": lambda **options: sparse_divergence(
        matrix(1, 4), matrix(5, 4), whole(0, 1).view(1, 2), matrix(1, 2).neg(), **options
    ),
}


@pytest.mark.parametrize("op", ON_THE_CPU)
def test_forced_kernels_that_cannot_run_are_refused_under_auto_too(op, monkeypatch):
    why = "FASTALIGN_CPU_ISA=mmx cannot be honoured: no kernels named 'mmx' were built"
    monkeypatch.setattr(cpu, "in_use", cpu.Selection(unavailable=why, refused=True))
    for backend in ("auto", "cpu"):
        with pytest.raises(BackendError, match=rf"backend='{backend}' cannot run {op} here: FASTALIGN_CPU_ISA=mmx"):
            ON_THE_CPU[op](backend=backend)
    ON_THE_CPU[op](backend="torch")


@pytest.mark.parametrize("op", ON_THE_CPU)
def test_without_a_build_auto_is_torch_and_cpu_raises(op, monkeypatch):
    monkeypatch.setattr(cpu, "in_use", cpu.Selection(unavailable="the native module is not built, run `make build`"))
    ON_THE_CPU[op]()
    with pytest.raises(BackendError, match=rf"backend='cpu' cannot run {op} here: .*not built, run `make build`"):
        ON_THE_CPU[op](backend="cpu")


@pytest.mark.parametrize("op", ON_THE_CPU)
def test_an_unknown_backend_lists_the_known(op):
    with pytest.raises(BackendError, match=rf"backend is 'tpu'; {op} has auto, (reference, )?torch, cpu"):
        ON_THE_CPU[op](backend="tpu")


def test_slow_kernels_are_not_taken_by_themselves():
    t = torch.zeros(1)
    cpu.select("plain")
    try:
        assert pick.resolve("op", "auto", t) == "torch"
        assert pick.resolve("op", "auto", t, only_if_fast=False) == "cpu"
        assert pick.resolve("op", "cpu", t) == "cpu"
    finally:
        cpu.select(None)
    assert pick.resolve("op", "auto", t.double()) == "torch"
    assert pick.resolve("op", "auto", t, why_not=lambda name: "no") == "torch"
    assert pick.resolve("op", "auto", t, cpu_kernel="of_tomorrow", only_if_fast=False) == "torch"
    assert pick.resolve("op", "auto", t, backends=("auto", "torch")) == "torch"
