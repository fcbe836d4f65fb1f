"""The native module from Python: which kernels are chosen, what `fastalign info` is told, what it takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastalign.errors import BackendError
from fastalign.ops.backends import cpu

EPS = torch.finfo(torch.float32).eps
ISAS = cpu.describe()["kernels_available"]


def test_vector_exp_is_within_two_ulp(isa):
    kernels = cpu.module.kernels(isa)
    x = torch.cat([torch.linspace(-87.29, 88.0, 400_001), torch.linspace(-1e-3, 1e-3, 10_001)])
    out = torch.empty_like(x)
    kernels.exp_f32(x.data_ptr(), out.data_ptr(), x.numel())
    exact = x.double().exp()
    ulp = torch.nextafter(exact.float(), torch.tensor(float("inf"))).double() - exact.float().double()
    assert ((out.double() - exact) / ulp).abs().max() <= 2
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, -87.4, -1e30, -inf, 89.0, inf, nan])
    out = torch.empty_like(x)
    kernels.exp_f32(x.data_ptr(), out.data_ptr(), x.numel())
    torch.testing.assert_close(out, torch.tensor([1.0, 1.0, 0, 0, 0, inf, inf, nan]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(1, device="meta"), "a tensor lies on meta"),
        (torch.zeros(1).to(torch.float8_e4m3fn), "a tensor is torch.float8_e4m3fn; it takes float32, float64"),
    ],
    ids=["device", "dtype"],
)
def test_tensors_that_it_cannot_read_are_named(tensor, why):
    assert cpu.why_not(torch.zeros(1), None, tensor).startswith(why)
    assert cpu.why_not(torch.zeros(1), None, torch.zeros(1, dtype=torch.int64)) is None


def test_a_module_without_a_kernel_is_older_than_its_sources():
    assert cpu.why_no_kernel("forward") is None
    assert "older than its sources, run `make build`" in cpu.why_no_kernel("of_tomorrow")


def test_unknown_kernels_are_refused():
    with pytest.raises(BackendError, match=r"no kernels named 'mmx' were built; there are .*plain"):
        cpu.select("mmx")


def test_without_a_build_nothing_runs(monkeypatch):
    monkeypatch.setattr(cpu, "module", None)
    with pytest.raises(BackendError, match="not built, run `make build`"):
        cpu.select(None)


SCRIPT = """
import torch
from fastalign import linear_logprobs
from fastalign.ops.backends import cpu
print(cpu.describe()["isa"])
print(linear_logprobs(torch.ones(1, 2), torch.ones(4, 2), torch.zeros(1, dtype=torch.int64)).item())
"""


def in_environment(isa="", **more):
    environment = {**os.environ, "FASTALIGN_CPU_ISA": isa, **more}
    return subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)


def test_the_environment_forces_a_path():
    done = in_environment("plain")
    isa, logprob = done.stdout.split()
    assert isa == "plain" and float(logprob) == pytest.approx(-1.3862944, rel=4 * EPS)


def test_a_brgemm_that_refuses_is_found_out_before_it_is_used():
    """oneDNN, held to AVX2, throws where it is asked for a product of pairs."""
    done = in_environment(ONEDNN_MAX_CPU_ISA="AVX2")
    isa, logprob = done.stdout.split()
    assert isa != "avx512_bf16" and float(logprob) == pytest.approx(-1.3862944, rel=4 * EPS)


def test_a_forced_path_that_is_not_there_is_refused_by_name():
    lacking = [name for name in cpu.describe()["kernels_compiled"] if name not in ISAS]
    for name in ["mmx", *lacking]:
        done = in_environment(name)
        assert done.returncode != 0
        assert f"FASTALIGN_CPU_ISA={name} cannot be honoured" in done.stderr.splitlines()[-1]


def test_describe_says_what_runs(isa):
    said = cpu.describe()
    assert said["built"] and said["isa"] == isa and said["unavailable"] is None
    assert said["threads"] == torch.get_num_threads() and said["thread_pool"] == "torch"
    assert said["compiler"] and set(said["kernels_available"]) <= set(said["kernels_compiled"])
