"""Where the anchored driver runs, and what its kernels are compiled for. Its numbers: tests/kernels/interpreted."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalign.kernels import anchored_logprobs as kernels
from fastalign.ops.backends import anchored, pick


@pytest.fixture
def on_gpu(monkeypatch):
    """A function that says why (hidden, weight) on a GPU of some compute capability are not taken."""

    def why_not(capability=(9, 0), dtype=torch.bfloat16, width=64):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        hidden, weight = (torch.empty(n, width, dtype=dtype, device="cuda") for n in (3, 5))
        return anchored.why_not(hidden, weight)

    with FakeTensorMode():
        yield why_not


def test_it_runs_from_hopper_on_in_16_bits(on_gpu):
    assert on_gpu() is on_gpu((10, 0)) is on_gpu((9, 0), torch.float16) is None
    assert "compute capability 8.0" in on_gpu((8, 0))
    assert "both bfloat16 or both float16" in on_gpu(dtype=torch.float32)
    assert "multiple of 8" in on_gpu(width=60)


def test_an_old_triton_is_said(on_gpu, monkeypatch):
    monkeypatch.setattr(anchored, "version", lambda name: "3.3.1")
    assert on_gpu() == "triton is 3.3.1; it needs 3.4 or newer: pip install -U triton"


def test_auto_takes_it_first_and_else_what_it_took_before(monkeypatch):
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    options = {"backends": (*pick.BACKENDS, "anchored"), "prefer": ("anchored", "triton")}
    with FakeTensorMode():
        hidden, weight = (torch.empty(4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        assert pick.resolve("op", "auto", hidden, weight, **options) == "anchored"
        capability[0] = (8, 6)
        assert pick.resolve("op", "auto", hidden, weight, **options) == "triton"
        assert pick.resolve("op", "auto", hidden.float(), weight.float(), **options) == "triton"


@pytest.mark.parametrize("kernel", [kernels.scan, kernels.rescue, kernels.finish])
def test_whether_exponentials_are_kept_and_the_size_of_the_batch_choose_no_other_binary(kernel):
    """Else the log-probs of training and of the reference, or of a row in two batches, could differ on a GPU."""
    parameters = {p.name: p for p in kernel.params}
    for name in {"rows", "keep"} & parameters.keys():
        assert parameters[name].do_not_specialize and not parameters[name].is_constexpr, name


def test_hopper_has_the_widest_tiles_and_everything_else_smaller_ones():
    assert kernels.tiles_for((9, 0), capped=False).n == 256
    assert kernels.tiles_for((9, 0), capped=True) == kernels.tiles_for((10, 0), capped=False)
    assert kernels.tiles_for((10, 0), capped=False).n == 128
