"""The state of torch in which kernels run."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


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
