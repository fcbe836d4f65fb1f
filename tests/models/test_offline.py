"""Imports that would reach the network on their own."""

import subprocess
import sys
import textwrap

import pytest

# What bitsandbytes 0.50 does when it is imported on a CPU with bfloat16 instructions.
BITSANDBYTES = """
import logging
try:
    from kernels import get_kernel
    get_kernel("kernels-community/quantization-bitsandbytes", version=1)
except Exception as error:
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward: %s", error)
    logging.getLogger("bitsandbytes.cextension").warning("another warning")
"""
KERNELS = """
def get_kernel(*args, **kwargs):
    print("FETCHED", *args)
"""


@pytest.mark.parametrize("installed", ["stand-in", "real"])
def test_bitsandbytes_fetches_nothing_and_does_not_complain_of_it(tmp_path, installed):
    """The stand-in shows it on every CPU; the real library only fetches on some."""
    (tmp_path / "kernels.py").write_text(KERNELS)
    if installed == "stand-in":
        (tmp_path / "bitsandbytes.py").write_text(BITSANDBYTES)
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import kernels, fastalign, importlib.util
        assert importlib.util.find_spec("bitsandbytes") is not None
        assert "bitsandbytes" not in sys.modules
        import bitsandbytes
        assert sys.modules["kernels"] is kernels, "kernels must be back in its place"
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "FETCHED" not in run.stdout
    assert "gemm_4bit_forward" not in run.stderr
    assert ("another warning" in run.stderr) == (installed == "stand-in")  # the guard hides that one message alone
