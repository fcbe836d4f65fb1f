"""Which backend runs an op: `resolve` turns a caller's `backend` argument into the name of what runs.

A backend that the caller names runs, or a BackendError says why it cannot. Nothing falls back silently.

"auto" picks by the device of the tensors:
- on a GPU: the first of "cuda" and "triton" that takes the tensors, else "torch";
- on the CPU: "cpu" (C++) where it takes them and is known to be faster, else "torch";
- elsewhere: "torch".

"cuda" comes before "triton" because its kernels took 0.4 to 1.1 of the time of Triton's on an H200, forward and
backward (docs/explanation/gpu.md). Either is 1.0 to 4 times as fast as the same steps in torch. The exception is
`linear_logprobs`, which prefers "triton": at three shapes it took 1.83, 2.15 and 4.03 ms, CUDA 2.03, 2.34 and 3.85.
Before both it takes "anchored" where that runs, which by its accounting needs a half of that (not measured yet).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastalign.errors import BackendError
from fastalign.ops.backends import anchored, cpu, cuda, triton

Backend = Literal["auto", "reference", "torch", "cpu", "triton", "cuda", "anchored"]
# Those of most ops. `linear_logprobs` alone has "anchored".
BACKENDS: tuple[Backend, ...] = tuple(name for name in get_args(Backend) if name != "anchored")
GPU_KERNELS: Mapping[Any, ModuleType] = {"cuda": cuda, "triton": triton, "anchored": anchored}
# The modules whose functions are the ops' forward and backward passes, by backend.
KERNELS: Mapping[Any, ModuleType] = {"cpu": cpu, **GPU_KERNELS}
# Why the kernels of a backend cannot take an op's arguments, or None.
WhyNot = Callable[[str], "str | None"]


def resolve(
    op: str,
    backend: Backend,
    *tensors: Tensor | None,
    backends: Sequence[Backend] = BACKENDS,
    cpu_kernel: str | None = None,
    only_if_fast: bool = True,
    prefer: tuple[Backend, ...] = ("cuda",),
    why_not: WhyNot | None = None,
) -> Backend:
    """The name of the backend that runs the op: one of `backends`, never "auto".

    Args:
        op: The op's name, for error messages.
        backend: The name that the caller gave.
        *tensors: The op's tensors; the first one, which decides the device and the dtype, is never None.
        backends: Those that the op has.
        cpu_kernel: A name that the native module must have for "cpu", such as that of the kernel.
        only_if_fast: Whether "auto" takes "cpu" only where `cpu.is_fast` says so for the first tensor's dtype.
        prefer: Which GPU kernels "auto" tries first, in this order.
        why_not: Why the kernels of a backend cannot take the arguments for reasons of this op alone, or None.

    Raises:
        BackendError: There is no such backend, or the backend that was named cannot run. Also, under "auto" on the CPU,
            where FASTALIGN_CPU_ISA asks for kernels that cannot run here.
    """
    if backend not in backends:
        raise BackendError(f"backend is {backend!r}; {op} has {', '.join(backends)}")
    if backend == "reference":
        return backend
    _refuse_transforms(op)
    if backend == "torch":
        return backend
    if backend != "auto":
        if why := _why_not(backend, tensors, cpu_kernel, why_not):
            raise BackendError(f"backend={backend!r} cannot run {op} here: {why}")
        return backend
    if on_gpu := pick_gpu_kernels(*tensors, backends=backends, prefer=prefer, why_not=why_not):
        return on_gpu
    first = tensors[0]
    if "cpu" not in backends or first is None or first.device.type != "cpu":
        return "torch"
    if cpu.in_use.refused:
        raise BackendError(f"backend='auto' cannot run {op} here: {cpu.in_use.unavailable}")
    if only_if_fast and not cpu.is_fast(first.dtype):
        return "torch"
    return "torch" if _why_not("cpu", tensors, cpu_kernel, why_not) else "cpu"


def _refuse_transforms(op: str) -> None:
    """The error of torch itself would name a method of autograd that a caller cannot override."""
    if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportAttributeAccessIssue] - has no public name
        raise BackendError(
            f"{op} runs inside a transform of torch.func (grad, vmap, jvp, ...), which cannot see into its kernels: "
            "pass backend='reference', or use torch.autograd.grad"
        )


def pick_gpu_kernels(
    *tensors: Tensor | None,
    backends: Sequence[Backend] = BACKENDS,
    prefer: tuple[Backend, ...] = ("cuda",),
    why_not: WhyNot | None = None,
) -> Backend | None:
    """The name of the GPU kernels that take these tensors, `prefer` before others.

    None where the first tensor lies on no GPU, or where no kernels take them.
    """
    first = tensors[0]
    if first is None or first.device.type != "cuda":
        return None
    names: list[Backend] = [*prefer, *GPU_KERNELS]
    for name in dict.fromkeys(names):
        if name in backends and _why_not(name, tensors, None, why_not) is None:
            return name
    return None


def _why_not(
    backend: Backend, tensors: Sequence[Tensor | None], cpu_kernel: str | None, why_not: WhyNot | None
) -> str | None:
    why = KERNELS[backend].why_not(*tensors)
    if why is None and backend == "cpu" and cpu_kernel is not None:
        why = cpu.why_no_kernel(cpu_kernel)
    if why is None and why_not is not None:
        why = why_not(backend)
    return why
