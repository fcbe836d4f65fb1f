"""Attention over segments of different lengths in one GPU kernel: flash-attn's where it is installed, else torch's.

Both kernels take `cu_seqlens`, so a segment's keys must lie next to each other. Keys and values are therefore gathered
into a longer row (`fastalign.data.segments`). A prompt that several completions see is there once for each of them.
Both kernels align their causal mask to the last key, so every query sees the whole prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign.data.segments import Varlen


class _Keys(torch.autograd.Function):
    """key and value (T, heads, D) -> key[key_index] and value[key_index], (K, heads, D).

    The gradient of a token is the sum over its places, added in a fixed order: the place in its segment first, and the
    pairs of `repeats` one after another. So the sum is the same from run to run. Autograd's gradient of indexing would
    have to sort for that.
    """

    @staticmethod
    def forward(ctx, key: Tensor, value: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
        ctx.varlen = varlen
        return key.index_select(0, varlen.key_index), value.index_select(0, varlen.key_index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor, None]:
        return _folded(grad_key, ctx.varlen), _folded(grad_value, ctx.varlen), None


def _folded(grad: Tensor, varlen: Varlen) -> Tensor:
    total = grad.index_select(0, varlen.own)
    for at, tokens in varlen.repeats:
        total.index_add_(0, tokens, grad.index_select(0, at))
    return total


@cache
def _flash_attn() -> Callable | None:
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def _torch_varlen() -> Callable | None:
    """The kernel of torch, if torch was built with one.

    Newer versions of the function need `enable_gqa=True` for fewer key heads than query heads. Older ones lack the
    argument and accept them.
    """
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in signature(varlen_attn).parameters else varlen_attn


def kernel(query: Tensor, value: Tensor, dropout: float, softcap: float | None, sinks: Tensor | None) -> str | None:
    """The kernel for (B, heads, T, D) with these options: "flash-attn", "torch", or None if neither computes it.

    Both need 16-bit tensors, a width of at most 256 and a GPU of compute capability 8.0. torch's kernel has neither
    dropout nor a soft cap.
    """
    width = query.shape[-1]
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if not half or sinks is not None or width != value.shape[-1] or width > 256:
        return None
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    if _flash_attn():
        return "flash-attn"
    return "torch" if _torch_varlen() and not dropout and softcap is None and width % 8 == 0 else None


def attend(
    name: str, query: Tensor, key: Tensor, value: Tensor, varlen: Varlen, *, window: int | None, dropout: float,
    scaling: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Attention over all segments of a row in one call.

    Args:
        name: the kernel, as `kernel` returned it.
        query: (1, heads, T, D).
        key: (1, kv_heads, T, D).
        value: (1, kv_heads, T, D).
        varlen: the segments.
        window: how many keys a query sees at most, itself included; None for all.
        dropout: probability that an attention weight is dropped.
        scaling: factor of the scores.
        softcap: bound of the scores' absolute value; None for no bound.

    Returns:
        (1, T, heads, D).
    """
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if varlen.repeats:  # without a prefix the keys lie in the right order already
        k, v = _Keys.apply(k, v, varlen)
    sizes = varlen.cu_seqlens_q, varlen.cu_seqlens_k, varlen.longest_q, varlen.longest_k
    before = -1 if window is None else window - 1
    run: Any = _torch_varlen() if name == "torch" else _flash_attn()
    if name == "torch":
        return run(q, k, v, *sizes, scale=scaling, window_size=(before, 0)).unsqueeze(0)
    return run(
        q, k, v, *sizes, dropout_p=dropout, softmax_scale=scaling, causal=True,
        window_size=(-1, -1) if window is None else (before, 0), softcap=softcap or 0.0,
    ).unsqueeze(0)  # fmt: skip
