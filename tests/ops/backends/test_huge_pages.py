"""Large results of the native kernels lie on huge pages, where Linux has them and no host takes them back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastalign
from fastalign.ops.backends import cpu, cpu_head

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages"
)
N, H, V = 128, 192, 1 << 16  # of all that is looked at more than 32 MiB, which glibc keeps for nobody else


def asked_for(t: torch.Tensor) -> bool:
    """Whether huge pages were asked for where the middle of `t` lies."""
    middle, inside = t.data_ptr() + t.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(edge, 16) for edge in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("no mapping holds it")


@pytest.fixture(autouse=True)
def huge_pages(request):
    """Asked for, whatever machine tests, but where a test says otherwise; afterwards as the machine has it."""
    cpu.module.use_huge_pages(getattr(request, "param", True))
    yield
    cpu.module.use_huge_pages(not cpu.host_takes_memory_back())


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(N, H), torch.randn(V, H, requires_grad=True), torch.randint(V, (N,))


def test_new_memory_is_not_on_them_by_itself(inputs):
    assert not asked_for(torch.empty(V, H)), "or the tests below would tell nothing"


def test_the_weights_gradient_and_the_kept_probabilities(inputs):
    hidden, weight, targets = inputs
    (grad,) = torch.autograd.grad(fastalign.linear_logprobs(hidden, weight, targets, backend="cpu").sum(), weight)
    assert asked_for(grad)
    *_, cache, _ = cpu_head.linear_logprobs(
        hidden, weight.detach(), targets, None, None, (1.0, None, 1.0), grads=False, entropy=False, cache_rows=N
    )
    assert asked_for(cache)


def test_the_weights_gradient_of_divergences(inputs):
    hidden, weight, targets = inputs
    head = (1.0, 0.0, 1.0)
    student, teacher = (hidden, weight.detach(), None, head), (torch.randn(N, H), torch.randn(V, H), None, head)
    formed = cpu_head.linear_divergence(
        student, teacher, None, "forward_kl", 0.5, grads=True, budget=1 << 20, coefficients=torch.ones(N),
        needs=(True, False),
    )  # fmt: skip
    assert asked_for(formed[3])
    logprobs = torch.full((N, 2), 0.25).log()
    indices = torch.stack([targets, (targets + 1) % V], 1).sort(1).values
    loss = fastalign.sparse_divergence(hidden, weight, indices, logprobs, backend="cpu").sum()
    (grad,) = torch.autograd.grad(loss, weight)
    assert asked_for(grad)


def test_the_gradient_of_logits(inputs):
    logits = torch.randn(N, V, requires_grad=True)
    (grad,) = torch.autograd.grad(fastalign.selective_logprobs(logits, inputs[2], backend="cpu").sum(), logits)
    assert asked_for(grad)


@pytest.mark.parametrize("huge_pages", [False], indirect=True)
def test_none_are_asked_for_where_they_are_slow(inputs, huge_pages):
    hidden, weight, targets = inputs
    (grad,) = torch.autograd.grad(fastalign.linear_logprobs(hidden, weight, targets, backend="cpu").sum(), weight)
    assert not asked_for(grad)


@pytest.mark.parametrize(
    ("features", "found"),
    [({}, False), ({"virtio0": "0110010100"}, True), ({"virtio0": "0110000100", "virtio3": "0000010000"}, True),
     ({"virtio0": "0110000111"}, False), ({"virtio0": "011"}, False)],
)  # fmt: skip
def test_hosts_that_take_memory_back_are_known_by_a_feature(features, found, monkeypatch, tmp_path):
    for device, bits in features.items():
        (tmp_path / device).mkdir()
        (tmp_path / device / "features").write_text(f"{bits}\n", encoding="ascii")
    monkeypatch.setattr(cpu, "Path", lambda path: tmp_path)
    assert cpu.host_takes_memory_back() is found


def test_a_feature_that_cannot_be_read_stops_nothing(monkeypatch, tmp_path):
    (tmp_path / "virtio0" / "features").mkdir(parents=True)
    monkeypatch.setattr(cpu, "Path", lambda path: tmp_path)
    assert not cpu.host_takes_memory_back()
