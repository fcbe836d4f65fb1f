"""What backends "triton" and "cuda" say where they cannot run: for each op, what is missing, and how to get it."""

from __future__ import annotations

import pytest
import torch

from fastalign import linear_divergence, linear_logprobs, preference_loss, selective_logprobs
from fastalign.errors import BackendError, InputError
from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.backends import cuda, pick, triton
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
        assert pick.pick(tensor(), None, tensor()) == "cuda"
        assert pick.pick(tensor(), None, tensor(), prefer="triton") == "triton"
        assert pick.pick(tensor("cpu")) is None
        monkeypatch.setattr(cuda, "module", None)
        assert pick.pick(tensor()) == "triton"
        monkeypatch.setattr(triton, "why_not", lambda *tensors: "no")
        assert pick.pick(tensor()) is None
        monkeypatch.setattr(cuda, "module", Built)
        assert pick.pick(tensor(), prefer="triton") == "cuda"


@pytest.mark.parametrize("op", CALLS)
def test_auto_prefers_triton_for_log_probs_and_cuda_for_the_rest(op, monkeypatch):
    asked = []
    monkeypatch.setattr(pick, "pick", lambda *tensors, prefer="cuda": asked.append(prefer))
    CALLS[op]()
    assert asked == ["triton" if op == "linear_logprobs" else "cuda"]
