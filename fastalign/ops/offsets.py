"""Offsets of packed sequences (`cu_seqlens`): sequence s is the tokens `cu_seqlens[s]` to `cu_seqlens[s + 1]`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.errors import InputError


def as_offsets(cu_seqlens: Tensor) -> Tensor:
    """Offsets (S + 1,) as the kernels take them: int64. int32, which flash-attn uses, is converted.

    Raises:
        InputError: The tensor has another dtype, more than one dimension, or no entry.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int64, torch.int32) or cu_seqlens.numel() == 0:
        raise InputError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be (S + 1,) offsets of int64 or int32"
        )
    return cu_seqlens.long()


def check_offsets(cu_seqlens: Tensor, tokens: int, *, all_tokens: bool = True) -> None:
    """Checks the values of offsets.

    This reads values, so it must run inside an op (torch.compile does not trace into ops), and it waits for a GPU.

    Args:
        cu_seqlens: (S + 1,) offsets, which must not fall.
        tokens: The number of tokens that they divide.
        all_tokens: Whether they must begin with 0 and end with `tokens`, or may cover a part of these.

    Raises:
        InputError: They are not so.
    """
    if not _fit(cu_seqlens, tokens, all_tokens):
        raise offsets_error(cu_seqlens, tokens, all_tokens=all_tokens)


def assert_offsets(cu_seqlens: Tensor, tokens: int, *, op: str, all_tokens: bool = True) -> None:
    """The check of `check_offsets` as an assertion that runs on the GPU. The host does not wait for it."""
    message = f"{op}: cu_seqlens does not rise {_range(tokens, all_tokens)}"
    torch._assert_async(_fit(cu_seqlens, tokens, all_tokens), message)  # pyright: ignore[reportPrivateImportUsage] - has no public name


def offsets_error(cu_seqlens: Tensor, tokens: int, *, all_tokens: bool = True) -> InputError:
    """The error that says what is wrong with offsets that do not fit; for arguments see `check_offsets`."""
    return InputError(f"cu_seqlens is {cu_seqlens.tolist()[:8]}...; it must rise {_range(tokens, all_tokens)}")


def _fit(cu_seqlens: Tensor, tokens: int, all_tokens: bool) -> Tensor:
    first, last = cu_seqlens[0], cu_seqlens[-1]
    ends = (first == 0) & (last == tokens) if all_tokens else (first >= 0) & (last <= tokens)
    return ends & (cu_seqlens.diff() >= 0).all()


def _range(tokens: int, all_tokens: bool) -> str:
    return f"from 0 to {tokens}, the number of tokens" if all_tokens else f"within [0, {tokens}], the tokens"
