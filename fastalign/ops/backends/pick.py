"""Which kernels backend="auto" stands for on a GPU.

Measured on an H200 (GPU section of bench/LOG.md), forward and backward: kernels of CUDA C++ take 0.4 to 1.1 of the time
of Triton's, and either is 1.0 to 4 times as fast as the same steps in torch. So CUDA comes first where it is built, but
for linear_logprobs: there Triton took 1.83 and 2.15 ms against 2.03 and 2.34, and 4.03 against 3.85 at a third shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from fastalign.ops.backends import cuda, triton

KERNELS = {"cuda": cuda, "triton": triton}


def pick(first: Tensor, *others: Tensor | None, prefer: str = "cuda") -> str | None:
    """The name of the kernels that take these tensors, `prefer` before others; None where they lie on no GPU, or none
    does.
    """
    if first.device.type != "cuda":
        return None
    names = sorted(KERNELS, key=lambda name: name != prefer)
    return next((name for name in names if KERNELS[name].why_not(first, *others) is None), None)


BACKENDS = ("auto", "reference", "torch", "cpu", "triton", "cuda")


def without_autocast(kernel: Callable) -> Callable:
    """The kernel as it is outside of autocast, which would round its products, and so the logits, to 16 bits; with
    its tensors' GPU the current one, which Triton launches on.
    """

    @wraps(kernel)
    def run(first: Tensor, *args, **options):
        with torch.autocast(first.device.type, enabled=False), torch.cuda.device_of(first):
            return kernel(first, *args, **options)

    return run
