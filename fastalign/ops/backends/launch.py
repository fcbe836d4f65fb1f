"""What the GPU backends share: the tensors that their kernels take, and the state of torch in which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_on(device: str, tensors: Sequence[Tensor | None], *, hint: str = "") -> str | None:
    """Why kernels that run on this type of device cannot take the tensors, or None.

    hint: How else the kernels could run, for tensors elsewhere.
    """
    given = [t for t in tensors if t is not None]
    for t in given:
        if t.device.type != device:
            return f"a tensor lies on {t.device}, and the kernels run on {device}{hint}"
        if t.is_floating_point() and t.dtype not in GPU_DTYPES:
            return f"a tensor is {t.dtype}; it takes float32, bfloat16 and float16"
    devices = {t.device for t in given}
    if len(devices) > 1:
        return f"tensors lie on {sorted(map(str, devices))}; move them to one device"
    return None


def without_autocast(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """The kernel with autocast off, and with its first tensor's GPU as the current one.

    Autocast would round the products, and so the logits, to 16 bits. Triton launches on the current GPU, whichever GPU
    the tensors lie on.
    """

    @wraps(kernel)
    def run(first: Tensor, *args, **options) -> Result:
        with torch.autocast(first.device.type, enabled=False), torch.cuda.device_of(first):
            return kernel(first, *args, **options)

    return run
