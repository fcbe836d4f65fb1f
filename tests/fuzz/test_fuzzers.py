"""A few examples of each fuzzer, the same ones in every run. `soak.py` beside this file runs many others."""

from __future__ import annotations

import contextlib

import fuzz_losses
import fuzz_ops
import fuzz_options
import fuzz_readers
import pytest
from comparing import Draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastalign.errors import FastAlignError

CHECKS = {**fuzz_ops.CHECKS, **fuzz_losses.CHECKS, **fuzz_readers.CHECKS, **fuzz_options.CHECKS}
FEW = settings(max_examples=15, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", CHECKS)
def test_nothing_crashes_or_lies(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @FEW
    @given(st.data())
    def check(data):
        with contextlib.suppress(FastAlignError):
            CHECKS[name](Draw(data))

    check()
