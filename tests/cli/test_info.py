"""`fastalign info`."""

from __future__ import annotations

import platform
import re

import torch

from fastalign import __version__
from fastalign.cli.main import main
from fastalign.ops.backends import cpu


def test_info_says_what_is_in_use(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (__version__, "torch", "transformers", "native module"):
        assert word in text
    found = cpu.describe()
    kernels = next(line for line in text.splitlines() if line.startswith("cpu kernels"))
    assert kernels.split()[2] == f"{found['isa']}," and f"{torch.get_num_threads()} threads of torch" in kernels
    assert f"{found['vector_bits']}-bit vectors" in kernels
    assert ("BRGEMM in use" in kernels) == (found["isa"] == "avx512_bf16")
    module = next(line for line in text.splitlines() if line.startswith("native module"))
    assert "without" not in module, "this compiler takes the flags of every instruction set"


def test_info_of_kernels_that_were_not_chosen(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "_brgemm", True)  # as on a machine with AMX
    cpu.select("plain")
    try:
        assert main(["info"]) == 0
    finally:
        cpu.select(None)
    assert re.search(r"^cpu kernels +plain, .* BRGEMM there, but not used", capsys.readouterr().out, re.MULTILINE)


def test_info_names_the_kernels_that_were_not_compiled(capsys, monkeypatch):
    found = cpu.describe() | {"kernels_compiled": ["avx2", "plain"]}
    monkeypatch.setattr(cpu, "describe", lambda: found)
    for machine, said in (("x86_64", "avx2, plain; without avx512_bf16, avx512,"), ("aarch64", "avx2, plain\n")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert main(["info"]) == 0
        assert said in capsys.readouterr().out
