"""The CUDA C++ kernels (csrc/cuda) seen from Python: whether they are built, and launches on raw pointers.

Each launch goes to the tensors' device and to the stream that is current there; nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastalign.errors import BackendError

try:
    from fastalign import _cuda as module
except ImportError:  # built without nvcc; `fastalign info` says so, and backend="cuda" raises
    module = None

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/cuda/launchers.h
NOT_BUILT = "fastalign was built without CUDA: install nvcc (the CUDA toolkit) and run `make build`"


def describe() -> str:
    """What `fastalign info` says of the kernels."""
    return NOT_BUILT.replace("fastalign was built", "built") if module is None else f"built with {module.compiler}"


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    if module is None:
        return NOT_BUILT
    given = [t for t in tensors if t is not None]
    for t in given:
        if t.device.type != module.device_type:
            return f"a tensor lies on {t.device}, and the kernels run on {module.device_type}"
        if t.is_floating_point() and t.dtype not in DTYPES:
            return f"a tensor is {t.dtype}; it takes float32, bfloat16 and float16"
    devices = {t.device for t in given}
    if len(devices) > 1:
        return f"tensors lie on {sorted(map(str, devices))}; move them to one device"
    return None


def _launch(kernel: str, problem: Any, at: Tensor, **fields: Tensor | float | None) -> None:
    """Fill in the problem's fields (a tensor's address, None's 0) and launch it on `at`'s device and stream."""
    for name, value in fields.items():
        setattr(problem, name, value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value)
    on_gpu = at.device.type == "cuda"
    stream = torch.cuda.current_stream(at.device).cuda_stream if on_gpu else 0
    run: Callable[[Any, int, int], None] = getattr(module, kernel)
    try:
        run(problem, at.device.index or 0, stream)
    except RuntimeError as error:
        raise BackendError(f"the CUDA kernel {kernel} could not be launched on {at.device}: {error}") from error


def _rows(t: Tensor) -> Tensor:
    """As the kernels take a matrix: its rows anywhere, each without gaps."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def selective_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """`z_y - logsumexp(z)` with `z = logits / temperature`: logits (N, V), targets (N,) -> logprobs (N,), stats (N, 2).

    0 where the target is `ignore_index`, NaN where it is outside the vocabulary. stats: max z, log sum exp(z - max z).
    """
    logits, targets = _rows(logits), targets.contiguous()
    logprobs = logits.new_empty(logits.shape[0], dtype=torch.float32)
    stats = logits.new_empty(logits.shape[0], 2, dtype=torch.float32)
    _launch(
        "selective_logprobs", module.Gather(), logits, dtype=DTYPES[logits.dtype], logits=logits,
        stride=logits.stride(0), targets=targets, rows=logits.shape[0], vocab=logits.shape[1],
        ignore_index=ignore_index, factor=1 / temperature, logprobs=logprobs, stats=stats,
    )  # fmt: skip
    return logprobs, stats


def selective_logprobs_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    temperature: float,
    ignore_index: int,
    *,
    in_place: bool = False,
) -> Tensor:
    """`grad (onehot - p) / temperature` in the logits' dtype, (N, V); with `in_place` in the logits' own memory."""
    rows = _rows(logits)
    out = rows if in_place or rows is not logits else torch.empty_strided(
        rows.shape, rows.stride(), dtype=rows.dtype, device=rows.device
    )  # fmt: skip
    targets, grad = targets.contiguous(), grad.to(torch.float32).contiguous()
    _launch(
        "selective_logprobs_backward", module.Gather(), logits, dtype=DTYPES[rows.dtype], logits=rows,
        stride=rows.stride(0), targets=targets, rows=rows.shape[0], vocab=rows.shape[1], ignore_index=ignore_index,
        factor=1 / temperature, stats=stats, grad=grad, grad_logits=out,
    )  # fmt: skip
    if in_place and out is not logits:
        return logits.copy_(out)
    return out
