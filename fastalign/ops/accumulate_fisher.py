"""The exact per-sequence diagonal of a linear layer's Fisher information, without per-sequence gradients: the public
function, and its plain torch driver; C++ in csrc/cpu/kernels/fisher-inl.h, for GPUs kernels/ and
csrc/cuda/accumulate_fisher.cu.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.backends import cpu, pick

BACKENDS = ("auto", "reference", "torch", "cpu", "triton", "cuda")
# Of the tile of F, and of the product beside it: both stay in a core's cache.
_TILE_BYTES = 1 << 18


@torch.no_grad()
def accumulate_fisher_(
    fisher: Tensor, grad_output: Tensor, input: Tensor, cu_seqlens: Tensor, *, backend: str = "auto"
) -> Tensor:
    """`F += sum_s (G_s' X_s)^2`, in place, where G_s and X_s are rows `cu_seqlens[s]` to `cu_seqlens[s + 1]`.

    For a linear layer `y = x W'` with inputs X and the loss's gradient G in its outputs, `G_s' X_s` is the gradient of
    sequence s in W: this adds up their squares, entry by entry, in one pass. The square is the epilogue of the product,
    on a tile of F that stays in the cache over all sequences: extra memory is that tile, whatever the shapes.

    fisher: (out, in) float32, float64 for float64 inputs, rows contiguous. grad_output: (T, out), input: (T, in),
    floating, multiplied in float32 (float64 for float64). cu_seqlens: (S + 1,) int64, rising; tokens outside it take no
    part. The result does not depend on the number of threads.
    backend: "cpu" (C++), "triton" or "cuda" (tensor cores; float32 in three TF32 products, on AMD as it is; nothing
    waits for the GPU), "torch" (any device), "reference", or "auto" ("cuda" or "triton" on a GPU, which is waited for
    only where sequences are as many as tokens: of one each, a product of squares is faster; else "cpu" where it runs,
    else "torch"). InputError names a wrong shape, dtype or offset; where a GPU is not waited for, wrong offsets end in
    a device-side assertion. BackendError names a backend that cannot run here. Returns fisher.
    """
    _check(fisher, grad_output, input, cu_seqlens)
    auto = backend == "auto"
    if auto:
        backend = pick.pick(fisher, grad_output, input, cu_seqlens) or backend
    looks = _looks(backend, auto, input.shape[0], cu_seqlens)
    _check_offsets(cu_seqlens, input.shape[0], looks=looks)
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; accumulate_fisher_ has {', '.join(BACKENDS)}")
    if grad_output.dtype != input.dtype:
        common = torch.promote_types(grad_output.dtype, input.dtype)
        grad_output, input = grad_output.to(common), input.to(common)
    if backend == "reference":
        return fisher.copy_(reference.accumulate_fisher(fisher, grad_output, input, cu_seqlens))
    if backend in pick.KERNELS:
        why = pick.KERNELS[backend].why_not(fisher, grad_output, input, cu_seqlens)
    else:
        why = cpu.why_not(fisher, grad_output, input) or cpu.why_no_kernel("accumulate_fisher")
    if backend in ("cpu", *pick.KERNELS) and why:
        raise BackendError(f"backend={backend!r} cannot run accumulate_fisher_ here: {why}")
    if cu_seqlens.numel() == 1 or not fisher.numel():
        return fisher
    with torch.autocast(fisher.device.type, enabled=False):  # it would round the products to 16 bits
        if looks and int(cu_seqlens.diff().max()) <= 1:
            return _one_token_each(fisher, grad_output, input, cu_seqlens)
        run = _torch if backend == "torch" or why else _native
        if backend in pick.KERNELS:
            run = pick.KERNELS[backend].accumulate_fisher
        run(fisher, grad_output, input, cu_seqlens)
    return fisher


def _looks(backend: str, auto: bool, tokens: int, cu_seqlens: Tensor) -> bool:
    """Whether to look at the offsets, for which a GPU has to be waited for."""
    if backend not in pick.KERNELS or cu_seqlens.device.type == "cpu":
        return True
    # Worth it where sequences may have a token each: a kernel's tiles would use 1 row of 32.
    return auto and cu_seqlens.numel() - 1 >= tokens and not torch.cuda.is_current_stream_capturing()


def _one_token_each(fisher: Tensor, grad_output: Tensor, input: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`(g_i x_j)^2 = g_i^2 x_j^2`: a product of squares."""
    tokens = slice(int(cu_seqlens[0]), int(cu_seqlens[-1]))
    g, x = grad_output[tokens].to(fisher.dtype), input[tokens].to(fisher.dtype)
    return fisher.addmm_((g * g).T, x * x)


def _torch(fisher: Tensor, grad_output: Tensor, input: Tensor, cu_seqlens: Tensor) -> None:
    rows = max(16, _TILE_BYTES // (fisher.shape[1] * fisher.element_size()))
    if fisher.is_cuda:  # there a product needs many rows to be fast
        rows = max(rows, 1024)
    product = fisher.new_empty(min(rows, fisher.shape[0]), fisher.shape[1])
    bounds = list(pairwise(cu_seqlens.tolist()))
    for at in range(0, fisher.shape[0], rows):
        tile = fisher[at : at + rows]
        out = product[: tile.shape[0]]
        for start, end in bounds:
            g, x = grad_output[start:end, at : at + rows], input[start:end]
            torch.mm(g.to(fisher.dtype).T, x.to(fisher.dtype), out=out)
            tile.addcmul_(out, out)


def _native(fisher: Tensor, grad_output: Tensor, input: Tensor, cu_seqlens: Tensor) -> None:
    grad_output = grad_output if grad_output.stride(1) == 1 else grad_output.contiguous()
    input = input if input.stride(1) == 1 else input.contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    cpu.run(
        "accumulate_fisher", cpu.dtype_code(input.dtype), fisher.data_ptr(), fisher.stride(0),
        grad_output.data_ptr(), grad_output.stride(0), input.data_ptr(), input.stride(0),
        cu_seqlens.data_ptr(), cu_seqlens.numel() - 1, *fisher.shape,
    )  # fmt: skip


def _check(fisher: Tensor, grad_output: Tensor, input: Tensor, cu_seqlens: Tensor) -> None:
    shapes = f"grad_output {tuple(grad_output.shape)}, input {tuple(input.shape)}, fisher {tuple(fisher.shape)}"
    fits = grad_output.dim() == input.dim() == fisher.dim() == 2 and grad_output.shape[0] == input.shape[0]
    if not fits or fisher.shape != (grad_output.shape[1], input.shape[1]):
        raise InputError(f"The shapes are {shapes}; they must be (T, out), (T, in), (out, in)")
    if not grad_output.is_floating_point() or not input.is_floating_point():
        raise InputError(f"grad_output is {grad_output.dtype} and input {input.dtype}; both must be floating")
    expected = reference.compute_dtype(grad_output, input)
    if fisher.dtype != expected or (fisher.numel() and fisher.stride(1) != 1):
        raise InputError(
            f"fisher is {fisher.dtype} with strides {fisher.stride()}; it must be {expected} with contiguous rows"
        )
    if len({t.device for t in (fisher, grad_output, input)}) > 1:
        raise InputError("fisher, grad_output and input lie on different devices; move them to one")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int64 or cu_seqlens.numel() == 0:
        raise InputError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be (S + 1,) int64")


def _check_offsets(cu_seqlens: Tensor, tokens: int, *, looks: bool) -> None:
    """An InputError where values may be looked at, else the device's own assertion, which nothing waits for."""
    fits = (cu_seqlens[0] >= 0) & (cu_seqlens[-1] <= tokens) & (cu_seqlens.diff() >= 0).all()
    if not looks:
        torch._assert_async(fits, f"accumulate_fisher_: cu_seqlens does not rise within [0, T={tokens}]")
    elif not fits:
        raise InputError(f"cu_seqlens is {cu_seqlens.tolist()[:8]}...; it must rise within [0, T={tokens}]")
