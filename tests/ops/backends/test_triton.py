"""Whether Triton's kernels can run here; tests/kernels runs them."""

from __future__ import annotations

import subprocess
import sys

import torch

from fastalign.ops.backends import triton


def test_the_package_is_found_missing_without_an_import(monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert "pip install triton" in triton.why_not(torch.zeros(1))


def test_a_tensor_that_they_cannot_take_is_named():
    said = triton.why_not(torch.zeros(1))
    assert "a tensor lies on cpu, and the kernels run on cuda" in said and "TRITON_INTERPRET=1" in said
    with torch._subclasses.fake_tensor.FakeTensorMode():
        on_gpu = torch.empty(2, device="cuda")
        assert triton.why_not(on_gpu, None, on_gpu.long()) is None
        assert "a tensor is torch.float64; it takes float32" in triton.why_not(on_gpu, on_gpu.double())


def test_the_kernels_are_not_imported_with_the_ops():
    script = "import sys, fastalign.ops; sys.exit(any('fastalign.kernels' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
