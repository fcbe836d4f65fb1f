"""Every Triton kernel in Triton's own interpreter, on the CPU: the tests of interpreted/, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastalign import linear_logprobs, selective_logprobs
from fastalign.errors import BackendError

FOLDER = Path(__file__).parent / "interpreted"


def test_interpreted():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER],
        capture_output=True, text=True, check=False, timeout=900, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def test_without_the_interpreter_a_cpu_tensor_is_refused_with_the_way_to_have_it():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, 2, 3])
    for run in (
        lambda: linear_logprobs(hidden, weight, targets, backend="triton"),
        lambda: selective_logprobs(hidden, targets, backend="triton"),
    ):
        with pytest.raises(BackendError, match=r"lies on cpu.*run on cuda; TRITON_INTERPRET=1"):
            run()
