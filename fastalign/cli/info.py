"""`fastalign info`: the versions, the device and the kernels that are in use."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from fastalign import __version__

_X86_KERNELS = ("avx512_bf16", "avx512", "avx2")


def add(commands: Any) -> None:
    """Adds `info` to the parser's commands."""
    commands.add_parser("info", help="show what is in use: versions, device, kernels").set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Prints one line per fact."""
    import platform
    from importlib.metadata import version

    import torch

    from fastalign.models.loading import default_dtype
    from fastalign.ops.backends import cpu, cuda

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    lines = {
        "fastalign": __version__,
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "transformers": f"{version('transformers')}, peft {version('peft')}",
        "device": device,
        "weights": f"{default_dtype(True)} under an adapter, {default_dtype(False)} when trained".replace("torch.", ""),
        **_cpu_lines(cpu.describe(), platform.machine()),
        "cuda kernels": cuda.describe(),
    }
    for label, value in lines.items():
        print(f"{label:<16}{value}")
    return 0


def _cpu_lines(found: Mapping[str, Any], machine: str) -> dict[str, str]:
    if not found["built"]:
        return {"native module": "not built: run `make build`"}
    compiled = found["kernels_compiled"]
    module = f"built with {found['compiler']}, for {', '.join(compiled)}"
    left_out = [isa for isa in _X86_KERNELS if isa not in compiled]
    if left_out and compiled and machine in ("x86_64", "AMD64"):
        module += f"; without {', '.join(left_out)}, whose flags this compiler does not take"
    kernels = found["unavailable"] or (
        f"{found['isa']}, {found['vector_bits']}-bit vectors, {found['threads']} threads of "
        f"{'torch' if found['thread_pool'] == 'torch' else 'their own'}, {_brgemm(found)}"
    )
    return {"native module": module, "cpu kernels": kernels}


def _brgemm(found: Mapping[str, Any]) -> str:
    if found["isa"] == "avx512_bf16":
        return "bf16 BRGEMM in use"
    return f"bf16 BRGEMM {'there, but not used by these' if found['brgemm_bf16'] else 'not in this torch or machine'}"
