"""The exact per-sequence diagonal of a linear layer's Fisher information, without per-sequence gradients.

This file holds the public function and its plain torch driver. The C++ is in csrc/cpu/kernels/fisher-inl.h. For GPUs
there are kernels/accumulate_fisher.py and csrc/cuda/accumulate_fisher.cu.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastalign import reference
from fastalign.errors import InputError
from fastalign.ops.backends import pick
from fastalign.ops.backends.launch import without_autocast
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head.checks import check_devices
from fastalign.ops.offsets import as_offsets, assert_offsets, check_offsets

BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch", "cpu", "triton", "cuda")
# Bytes of one tile of F, and of the product beside it, so that both stay in a core's cache.
_TILE_BYTES = 1 << 18


@torch.no_grad()
def accumulate_fisher_(
    fisher: Tensor, grad_output: Tensor, inputs: Tensor, cu_seqlens: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """`F += sum_s (G_s' X_s)^2`, in place, where G_s and X_s are the rows of sequence s.

    For a linear layer `y = x W'` with inputs X and the loss's gradient G in its outputs, `G_s' X_s` is the gradient of
    sequence s in W. This adds up their squares, entry by entry, in one pass. The square is the epilogue of the product,
    on a tile of F that stays in the cache over all sequences. So the extra memory is that tile, whatever the shapes.

    Args:
        fisher: (out, in) float32, or float64 for float64 inputs, with contiguous rows. It is changed in place.
        grad_output: (T, out) floating.
        inputs: (T, in) floating. Products are formed in float32, or float64 for float64.
        cu_seqlens: (S + 1,) int64 or int32, rising within [0, T]: sequence s is the tokens `cu_seqlens[s]` to
            `cu_seqlens[s + 1]`. Tokens outside of all sequences take no part.
        backend: One of
            "cpu": C++, with the same result for any number of threads;
            "triton", "cuda": tensor cores of a GPU; float32 in three TF32 products, on AMD as it is;
            "torch": any device;
            "reference": one product per sequence;
            "auto": on a GPU "cuda", else "triton", where either runs; on the CPU "cpu" where it runs; else "torch".
            Sequences of one token each take a product of squares under "auto", which is faster. To notice them a GPU is
            waited for, but only where there are as many sequences as tokens. Nothing else waits for a GPU.

    Returns:
        fisher.

    Raises:
        InputError: A shape, dtype, device or offset does not fit. Where a GPU is not waited for, wrong offsets end in a
            device-side assertion instead.
        BackendError: There is no such backend, or the backend that was named cannot run.
    """
    _check(fisher, grad_output, inputs)
    cu_seqlens, auto, tokens = as_offsets(cu_seqlens), backend == "auto", inputs.shape[0]
    backend = pick.resolve(
        "accumulate_fisher_", backend, fisher, grad_output, inputs, cu_seqlens, cpu_kernel="accumulate_fisher",
        only_if_fast=False,
    )  # fmt: skip
    may_look = _may_look(backend, auto, tokens, cu_seqlens)
    if may_look:
        check_offsets(cu_seqlens, tokens, all_tokens=False)
    else:
        assert_offsets(cu_seqlens, tokens, op="accumulate_fisher_", all_tokens=False)
    if grad_output.dtype != inputs.dtype:
        common = torch.promote_types(grad_output.dtype, inputs.dtype)
        grad_output, inputs = grad_output.to(common), inputs.to(common)
    if backend == "reference":
        return fisher.copy_(reference.accumulate_fisher(fisher, grad_output, inputs, cu_seqlens))
    if cu_seqlens.numel() == 1 or not fisher.numel():
        return fisher
    if may_look and int(cu_seqlens.diff().max()) <= 1:
        run = _one_token_each
    else:
        run = _torch if backend == "torch" else pick.KERNELS[backend].accumulate_fisher
    without_autocast(run)(fisher, grad_output, inputs, cu_seqlens)
    return fisher


def _may_look(backend: str, auto: bool, tokens: int, cu_seqlens: Tensor) -> bool:
    """Whether to look at the offsets, for which a GPU has to be waited for."""
    if backend not in pick.GPU_KERNELS or cu_seqlens.device.type == "cpu":
        return True
    # It is worth waiting where sequences may have one token each: a kernel's tiles would use 1 of their 32 rows.
    return auto and cu_seqlens.numel() - 1 >= tokens and not torch.cuda.is_current_stream_capturing()


def _one_token_each(fisher: Tensor, grad_output: Tensor, inputs: Tensor, cu_seqlens: Tensor) -> None:
    """`(g_i x_j)^2 = g_i^2 x_j^2`: the sum over sequences is one product of squares."""
    tokens = slice(int(cu_seqlens[0]), int(cu_seqlens[-1]))
    g, x = grad_output[tokens].to(fisher.dtype), inputs[tokens].to(fisher.dtype)
    fisher.addmm_((g * g).T, x * x)


def _torch(fisher: Tensor, grad_output: Tensor, inputs: Tensor, cu_seqlens: Tensor) -> None:
    """All sequences on one tile of F's rows, then the next tile."""
    rows = max(16, _TILE_BYTES // (fisher.shape[1] * fisher.element_size()))
    if fisher.is_cuda:  # there a product needs many rows to be fast
        rows = max(rows, 1024)
    product = fisher.new_empty(min(rows, fisher.shape[0]), fisher.shape[1])
    bounds = list(pairwise(cu_seqlens.tolist()))
    for at in range(0, fisher.shape[0], rows):
        tile = fisher[at : at + rows]
        out = product[: tile.shape[0]]
        for start, end in bounds:
            g, x = grad_output[start:end, at : at + rows], inputs[start:end]
            torch.mm(g.to(fisher.dtype).T, x.to(fisher.dtype), out=out)
            tile.addcmul_(out, out)


def _check(fisher: Tensor, grad_output: Tensor, inputs: Tensor) -> None:
    shapes = f"grad_output {tuple(grad_output.shape)}, inputs {tuple(inputs.shape)}, fisher {tuple(fisher.shape)}"
    fits = grad_output.dim() == inputs.dim() == fisher.dim() == 2 and grad_output.shape[0] == inputs.shape[0]
    if not fits or fisher.shape != (grad_output.shape[1], inputs.shape[1]):
        raise InputError(f"The shapes are {shapes}; they must be (T, out), (T, in), (out, in)")
    if not grad_output.is_floating_point() or not inputs.is_floating_point():
        raise InputError(f"grad_output is {grad_output.dtype} and inputs {inputs.dtype}; both must be floating")
    expected = reference.compute_dtype(grad_output, inputs)
    if fisher.dtype != expected or (fisher.numel() and fisher.stride(1) != 1):
        raise InputError(
            f"fisher is {fisher.dtype} with strides {fisher.stride()}; it must be {expected} with contiguous rows"
        )
    check_devices(fisher, grad_output, inputs)
