"""Checks of the arguments that the ops over a vocabulary share. Each raises an InputError that names the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastalign import reference
from fastalign.errors import InputError


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, *, of: str = "") -> None:
    """Hidden states (..., H), an output layer's weight (V, H) and bias (V,), and its soft cap.

    of: what the arguments' names begin with, such as "teacher_".
    """
    for name, t in (("hidden", hidden), ("weight", weight)):
        if not t.is_floating_point():
            raise InputError(f"{of}{name} is {t.dtype}; it must be a floating dtype, dequantise it first")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise InputError(
            f"{of}hidden is {tuple(hidden.shape)} and {of}weight {tuple(weight.shape)}; "
            "they must be (..., H) and (V, H)"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise InputError(
            f"{of}bias is {tuple(bias.shape)} {bias.dtype}; it must be floating and ({weight.shape[0]},), one per row"
        )
    if softcap is not None and not softcap > 0:
        raise InputError(f"{of}softcap is {softcap}; it must be above 0, or None for no cap")


def check_targets(targets: Tensor, shape: Sequence[int], *, of: str) -> None:
    """Targets int64 of this shape, which is that of `of` ("hidden" or "logits") without its last dimension."""
    if targets.dtype != torch.int64:
        raise InputError(f"targets is {targets.dtype}; it must be int64, call targets.long()")
    if tuple(targets.shape) != tuple(shape):
        raise InputError(
            f"targets is {tuple(targets.shape)}; it must be {of}'s shape without the last, {tuple(shape)}"
            + shift_hint(targets.shape, shape, of)
        )


def shift_hint(targets: Sequence[int], expected: Sequence[int], of: str) -> str:
    """The end of an error where the lengths differ by 1: then only one of the two was shifted to the next token."""
    if not targets or len(targets) != len(expected) or tuple(targets[:-1]) != tuple(expected[:-1]):
        return ""
    if abs(targets[-1] - expected[-1]) != 1:
        return ""
    remedy = f"{of}[..., :-1, :]" if expected[-1] > targets[-1] else "targets[..., 1:]"
    return f". targets[..., t] is the token that {of}[..., t] predicts, the next one: pass {remedy}"


def check_token_ids(name: str, ids: Tensor, vocab: int, *, op: str, ignore_index: int | None = None) -> None:
    """Token ids in [0, vocab). `ignore_index` is only mentioned as what the caller may also pass.

    This looks at values. So it must run inside an op, where torch.compile does not look. On a GPU it must not wait for
    them, so there the device itself asserts, and the error is not an InputError.
    """
    inside = ids.clamp(0, vocab - 1) == ids
    if ids.device.type != "cpu":
        torch._assert_async(inside.all(), f"{op}: {name} holds a token id outside the vocabulary")  # pyright: ignore[reportPrivateImportUsage] - has no public name
    elif not inside.all():
        or_ignored = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise InputError(
            f"{name} holds {ids[~inside][0].item()}, but the vocabulary has {vocab} entries; give token ids in "
            f"[0, {vocab}){or_ignored}"
        )


def check_temperature(temperature: float) -> None:
    """A temperature above 0."""
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; it must be above 0")


def check_memory_budget(memory_budget: int | None) -> None:
    """A number of bytes, or None."""
    if memory_budget is not None and memory_budget < 0:
        raise InputError(f"memory_budget is {memory_budget}; it must be a number of bytes, or 0 for as few as possible")


def check_divergence(divergence: str, temperature: float, jsd_beta: float) -> None:
    """The name of a divergence and its two numbers."""
    if divergence not in reference.DIVERGENCES:
        raise InputError(f"divergence is {divergence!r}; it must be one of {', '.join(reference.DIVERGENCES)}")
    check_temperature(temperature)
    if divergence == "jsd" and not 0 < jsd_beta < 1:
        raise InputError(
            f"jsd_beta is {jsd_beta}; it must lie between 0 and 1, at whose ends stand forward_kl and reverse_kl"
        )


def check_tail(tail: str) -> None:
    """What becomes of the vocabulary entries that the teacher did not name."""
    if tail not in ("lump", "drop"):
        raise InputError(f"tail is {tail!r}; it must be lump or drop")


def check_per_token(mask: Tensor | None, token_weights: Tensor | None, shape: Sequence[int]) -> None:
    """A bool mask and floating weights, one per token: of this shape."""
    for name, t in (("mask", mask), ("token_weights", token_weights)):
        if t is not None and tuple(t.shape) != tuple(shape):
            raise InputError(f"{name} is {tuple(t.shape)}; it must be {tuple(shape)}, one per token")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask is {mask.dtype}; it must be bool, write mask != 0")
    if token_weights is not None and not token_weights.is_floating_point():
        raise InputError(f"token_weights is {token_weights.dtype}; it must be floating, call token_weights.float()")


def check_same_tokens(hidden: Tensor, teacher_hidden: Tensor) -> None:
    """Hidden states (..., H) and (..., G) of the same tokens."""
    expected = tuple(hidden.shape[:-1])
    if tuple(teacher_hidden.shape[:-1]) != expected:
        raise InputError(
            f"teacher_hidden is {tuple(teacher_hidden.shape)}; it must hold the student's tokens, {expected}, and its "
            "own width"
        )


def check_teacher_entries(shape: Sequence[int], vocab: int, indices: Tensor, logprobs: Tensor) -> None:
    """A teacher's entries int64 and their log-probabilities, both (*shape, k) with k from 1 to the vocabulary."""
    if indices.dtype != torch.int64:
        raise InputError(f"teacher_indices is {indices.dtype}; it must be int64, call teacher_indices.long()")
    if not logprobs.is_floating_point():
        raise InputError(f"teacher_logprobs is {logprobs.dtype}; it must be floating, call teacher_logprobs.float()")
    fits = indices.dim() > 0 and tuple(indices.shape[:-1]) == tuple(shape) and 0 < indices.shape[-1] <= vocab
    if not fits or indices.shape != logprobs.shape:
        raise InputError(
            f"teacher_indices is {tuple(indices.shape)} and teacher_logprobs {tuple(logprobs.shape)}; both must be "
            f"{(*shape, 'k')} with k from 1 to {vocab}"
        )


def check_devices(*tensors: Tensor | None) -> None:
    """All tensors on one device."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise InputError(f"inputs lie on {sorted(map(str, devices))}; move them to one device")
