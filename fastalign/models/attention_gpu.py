"""Attention over segments of different lengths in one GPU kernel: flash-attn's where that is installed, else torch's.

Keys and values are laid out once more, so that a segment's prefix lies before it: a prompt that several completions see
is there once for each. Both kernels align their causal mask to the last key, as a prefix needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Segment(NamedTuple):
    """`length` queries that see the first `prefix` tokens of segment `head`, then themselves causally."""

    length: int
    prefix: int
    head: int


class Varlen(NamedTuple):
    """Where the keys of T queries come from, and what the kernels are told."""

    key_index: Tensor  # (K,) int64, the token whose key each one is
    own: Tensor  # (T,) int64, where among the K each token's own is
    repeats: tuple[tuple[Tensor, Tensor], ...]  # (where among the K, token): the others, no token twice in one of them
    cu_seqlens_q: Tensor  # (segments + 1,) int32
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int


def lay_out(segments: Sequence[Segment], device: torch.device) -> Varlen:
    """The keys of packed segments, on the device."""
    starts = [0]
    for segment in segments:
        starts.append(starts[-1] + segment.length)
    keys, own, bounds, seen, repeats = [], [], [0], {}, []
    for segment, start in zip(segments, starts, strict=False):
        head = starts[segment.head]
        if segment.prefix:
            level = seen[segment.head] = seen.get(segment.head, -1) + 1
            if level == len(repeats):
                repeats.append(([], []))
            repeats[level][0].extend(range(len(keys), len(keys) + segment.prefix))
            repeats[level][1].extend(range(head, head + segment.prefix))
        keys += range(head, head + segment.prefix)
        own += range(len(keys), len(keys) + segment.length)
        keys += range(start, start + segment.length)
        bounds.append(len(keys))

    def index(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Varlen(
        index(keys), index(own), tuple((index(at), index(tokens)) for at, tokens in repeats),
        index(starts, torch.int32), index(bounds, torch.int32),
        max(s.length for s in segments), max(s.length + s.prefix for s in segments),
    )  # fmt: skip


class _Keys(torch.autograd.Function):
    """key, value (T, heads, D) -> key[key_index], value[key_index]. The gradient adds a token's repeats in their order:
    the same from run to run, without the sorting that autograd's own needs for that."""

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
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def _torch_varlen() -> Callable | None:
    """torch's kernel, where it was built with one; grouped keys have to be asked for where the function knows of them,
    and are taken where not."""
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in signature(varlen_attn).parameters else varlen_attn


def kernel(query: Tensor, value: Tensor, dropout: float, softcap: float | None, sinks: Tensor | None) -> str | None:
    """ "flash-attn" or "torch", whichever takes (B, heads, T, D) with these options; None: neither."""
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
    """query (1, heads, T, D), key and value (1, kv_heads, T, D) -> (1, T, heads, D), by the kernel `name`."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if varlen.repeats:  # without a prefix keys lie where they are to be
        k, v = _Keys.apply(k, v, varlen)
    sizes = varlen.cu_seqlens_q, varlen.cu_seqlens_k, varlen.longest_q, varlen.longest_k
    before = -1 if window is None else window - 1
    if name == "torch":
        return _torch_varlen()(q, k, v, *sizes, scale=scaling, window_size=(before, 0)).unsqueeze(0)
    return _flash_attn()(
        q, k, v, *sizes, dropout_p=dropout, softmax_scale=scaling, causal=True,
        window_size=(-1, -1) if window is None else (before, 0), softcap=softcap or 0.0,
    ).unsqueeze(0)  # fmt: skip
