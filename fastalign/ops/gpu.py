"""Which kernels backend="auto" stands for on a GPU.

Measured on an H200 (bench/LOG.md): where they are built, those of CUDA C++ are as fast as Triton's or faster, for their
launches cost the host less; either is two to six times faster than the same steps in torch.
"""

from __future__ import annotations

from torch import Tensor

from fastalign.ops import native_cuda, native_triton

KERNELS = {"cuda": native_cuda, "triton": native_triton}


def pick(first: Tensor, *others: Tensor | None) -> str | None:
    """The name of the first kernels that take these tensors; None where they lie on no GPU, or none does."""
    if first.device.type != "cuda":
        return None
    return next((name for name, kernels in KERNELS.items() if kernels.why_not(first, *others) is None), None)
