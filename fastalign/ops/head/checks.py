"""Checks of the arguments that the ops over a vocabulary share. Each raises an InputError that names the remedy."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastalign import reference
from fastalign.errors import InputError

# Options outside of these bounds overflow or underflow float32, which holds 1e-38 to 3e38. Two of them are multiplied.
_SMALLEST, _LARGEST = 1e-12, 1e12
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_linear(
    hidden: Tensor, weight: Any, bias: Tensor | None, softcap: float | None, logit_scale: float = 1.0, *,
    of: str = "",
) -> None:  # fmt: skip
    """Checks the shapes and dtypes of hidden states and their output layer, its soft cap and its scale.

    Args:
        hidden: Must be (..., H) floating.
        weight: Must be (V, H) floating, or a packed weight of this shape.
        bias: Must be (V,) floating, or None.
        softcap: Must be above 0 and finite, or None.
        logit_scale: Must be finite, and not 0.
        of: What the names of these arguments begin with in the error, such as "teacher_".

    Raises:
        InputError: One of them is not so.
    """
    check_floating(f"{of}hidden", hidden, "dequantise it first")
    if not hasattr(weight, "dequantize_rows"):  # a packed weight is of no floating dtype
        check_floating(f"{of}weight", weight, "dequantise it first")
    if len(weight.shape) != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise InputError(
            f"{of}hidden is {tuple(hidden.shape)} and {of}weight {tuple(weight.shape)}; "
            "they must be (..., H) and (V, H)"
        )
    check_vocabulary(f"{of}weight", weight.shape, weight.shape[0])
    if not weight.shape[1]:
        raise InputError(f"{of}weight is {tuple(weight.shape)}; hidden states have a width of at least 1")
    if bias is not None:
        check_floating(f"{of}bias", bias, "dequantise it first")
        if bias.shape != weight.shape[:1]:
            raise InputError(f"{of}bias is {tuple(bias.shape)}; it must be ({weight.shape[0]},), one per row")
    if softcap is not None:
        check_positive(f"{of}softcap", softcap, or_else=", or None for no cap")
    check_number(f"{of}logit_scale", logit_scale)
    if not 0 < abs(logit_scale) <= _LARGEST:
        raise InputError(
            f"{of}logit_scale is {logit_scale}; it must be finite, at most {_LARGEST:g} in size, and not 0, which "
            "would make all tokens equally likely"
        )


def check_floating(name: str, t: Tensor, remedy: str) -> None:
    """A dense tensor of a dtype that the ops compute with."""
    check_is_tensor(name, t)
    if t.dtype not in _FLOATING:
        raise InputError(f"{name} is {t.dtype}; it must be a floating dtype of 16 bits or more: {remedy}")
    if t.layout is not torch.strided:
        raise InputError(f"{name} is a tensor of layout {t.layout}; it must be dense: call {name}.to_dense()")


def check_is_tensor(name: str, t: object) -> None:
    """A tensor, not a list or an array."""
    if not isinstance(t, Tensor):
        raise InputError(f"{name} is a {type(t).__name__}; it must be a tensor: call torch.as_tensor({name})")


def check_vocabulary(name: str, shape: Sequence[int], vocab: int) -> None:
    """A vocabulary of at least one entry: over none there is no distribution."""
    if not vocab:
        raise InputError(f"{name} is {tuple(shape)}; the vocabulary must have at least 1 entry")


def check_number(name: str, value: object) -> None:
    """A number; a 0-d tensor counts as one."""
    if not isinstance(value, (int, float, Tensor)) and not isinstance(value, numbers.Real):
        raise InputError(f"{name} is {value!r}; it must be a number")


def check_positive(name: str, value: float, *, or_else: str = "") -> None:
    """A number above 0 that float32 can divide by and multiply with."""
    check_number(name, value)
    if not _SMALLEST <= value <= _LARGEST:
        raise InputError(f"{name} is {value}; it must be above 0 and finite ({_SMALLEST:g} to {_LARGEST:g}){or_else}")


def check_ignore_index(ignore_index: int | None) -> None:
    """An int64 that marks rows which do not count, or None."""
    whole = isinstance(ignore_index, int) and not isinstance(ignore_index, bool)
    if ignore_index is not None and not (whole and abs(ignore_index) < 2**63):
        raise InputError(f"ignore_index is {ignore_index!r}; it must be an int64 such as -100, or None")


def check_targets(targets: Tensor, shape: Sequence[int], *, of: str) -> None:
    """Checks the dtype and shape of targets, not their values.

    Args:
        targets: Must be int64.
        shape: The shape that they must have: that of `of` without its last dimension.
        of: "hidden" or "logits", for the error.

    Raises:
        InputError: The dtype or the shape differs. The error says so where only one of both was shifted.
    """
    check_is_tensor("targets", targets)
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
    """Checks that token ids lie in [0, vocab).

    This reads values, so it must run inside an op: torch.compile does not trace into ops. On a GPU the host must not
    wait for values, so there the device itself asserts, and the error is not an InputError.

    Args:
        name: The argument's name, for the error.
        ids: Integers of any shape.
        vocab: Number of entries of the vocabulary.
        op: The op's name, for the device's assertion.
        ignore_index: Named in the error as a value that the caller may also pass; it is not looked for in `ids`.

    Raises:
        InputError: An id lies outside (CPU only).
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


def check_target_ids(targets: Tensor, vocab: int, ignore_index: int | None, *, op: str) -> None:
    """Targets in [0, vocab), except those that are `ignore_index`. Looks at values, see `check_token_ids`."""
    counted = targets if ignore_index is None else targets.masked_fill(targets == ignore_index, 0)
    check_token_ids("targets", counted, vocab, op=op, ignore_index=ignore_index)


def check_temperature(temperature: float) -> None:
    """Checks that a temperature is above 0, and finite.

    Raises:
        InputError: It is not.
    """
    check_positive("temperature", temperature)


def check_memory_budget(memory_budget: int | None) -> None:
    """Checks that a memory budget is a whole number of bytes, 0 or more, or None.

    Raises:
        InputError: It is not.
    """
    if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget < 0):
        raise InputError(
            f"memory_budget is {memory_budget!r}; it must be a whole number of bytes, or 0 for as few as possible"
        )


def check_divergence(divergence: str, temperature: float, jsd_beta: float) -> None:
    """Checks the name of a divergence and its two numbers.

    Args:
        divergence: Must be one of `reference.DIVERGENCES`.
        temperature: Must be above 0.
        jsd_beta: Must lie strictly between 0 and 1 for "jsd".

    Raises:
        InputError: One of them is not so.
    """
    if divergence not in reference.DIVERGENCES:
        raise InputError(f"divergence is {divergence!r}; it must be one of {', '.join(reference.DIVERGENCES)}")
    check_temperature(temperature)
    check_number("jsd_beta", jsd_beta)
    if divergence == "jsd" and not 0 < jsd_beta < 1:
        raise InputError(
            f"jsd_beta is {jsd_beta}; it must lie between 0 and 1 (for the limits use forward_kl or reverse_kl)"
        )


def check_tail(tail: str) -> None:
    """Checks `tail`: what becomes of the vocabulary entries that the teacher did not name, "lump" or "drop".

    Raises:
        InputError: It is neither.
    """
    if tail not in ("lump", "drop"):
        raise InputError(f"tail is {tail!r}; it must be lump or drop")


def check_per_token(mask: Tensor | None, token_weights: Tensor | None, shape: Sequence[int]) -> None:
    """Checks that a mask is bool, that weights are floating, and that both have this shape, one value per token.

    Raises:
        InputError: One of them is not so.
    """
    for name, t in (("mask", mask), ("token_weights", token_weights)):
        if t is not None:
            check_is_tensor(name, t)
        if t is not None and tuple(t.shape) != tuple(shape):
            raise InputError(f"{name} is {tuple(t.shape)}; it must be {tuple(shape)}, one per token")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask is {mask.dtype}; it must be bool, write mask != 0")
    if token_weights is not None and not token_weights.is_floating_point():
        raise InputError(f"token_weights is {token_weights.dtype}; it must be floating, call token_weights.float()")


def check_same_tokens(hidden: Tensor, teacher_hidden: Tensor) -> None:
    """Checks that hidden states (..., H) and (..., G) are of the same tokens: equal in all but the last dimension.

    Raises:
        InputError: They are not.
    """
    expected = tuple(hidden.shape[:-1])
    if tuple(teacher_hidden.shape[:-1]) != expected:
        raise InputError(
            f"teacher_hidden is {tuple(teacher_hidden.shape)}; it must hold the student's tokens, {expected}, and "
            "may differ in its last dimension only"
        )


def check_teacher_entries(shape: Sequence[int], vocab: int, indices: Tensor, logprobs: Tensor) -> None:
    """Checks a teacher's top k: entries int64, log-probabilities floating, both (*shape, k), k from 1 to `vocab`.

    Raises:
        InputError: One of them is not so.
    """
    check_is_tensor("teacher_indices", indices)
    check_is_tensor("teacher_logprobs", logprobs)
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


class Placed(Protocol):
    """A tensor, or a packed weight."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        ...


def check_devices(*tensors: Placed | None) -> None:
    """Checks that all tensors are on one device.

    Raises:
        InputError: They are not. The error names the devices.
    """
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise InputError(f"inputs lie on {sorted(map(str, devices))}; move them to one device")
