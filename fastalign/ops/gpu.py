"""Which kernels backend="auto" stands for on a GPU.

Measured on an H200 (GPU section of bench/LOG.md), forward and backward: kernels of CUDA C++ take 0.4 to 1.1 of the time
of Triton's, and either is 1.0 to 4 times as fast as the same steps in torch. So CUDA comes first where it is built, but
for linear_logprobs: there Triton took 1.83 and 2.15 ms against 2.03 and 2.34, and 4.03 against 3.85 at a third shape.
"""

from __future__ import annotations

from torch import Tensor

from fastalign.ops import native_cuda, native_triton

KERNELS = {"cuda": native_cuda, "triton": native_triton}


def pick(first: Tensor, *others: Tensor | None, prefer: str = "cuda") -> str | None:
    """The name of the kernels that take these tensors, `prefer` before others; None where they lie on no GPU, or none
    does."""
    if first.device.type != "cuda":
        return None
    names = sorted(KERNELS, key=lambda name: name != prefer)
    return next((name for name in names if KERNELS[name].why_not(first, *others) is None), None)
