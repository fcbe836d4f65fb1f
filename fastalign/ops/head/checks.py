"""Checks of the arguments that ops over an output layer share."""

from __future__ import annotations

import torch

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.backends.pick import BACKENDS


def check_divergence_options(divergence, temperature, jsd_beta, memory_budget, backend):
    if divergence not in reference.DIVERGENCES:
        raise InputError(f"divergence is {divergence!r}; it must be one of {', '.join(reference.DIVERGENCES)}")
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; it must be above 0")
    if divergence == "jsd" and not 0 < jsd_beta < 1:
        raise InputError(
            f"jsd_beta is {jsd_beta}; it must lie between 0 and 1, at whose ends stand forward_kl and reverse_kl"
        )
    if memory_budget is not None and memory_budget < 0:
        raise InputError(f"memory_budget is {memory_budget}; it must be a number of bytes, or 0 for as few as possible")
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; linear_divergence has {', '.join(BACKENDS)}")


def check_side(of: str, hidden, weight, bias, softcap):
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


def check_teacher_rows(hidden, teacher_hidden, mask, token_weights):
    expected = tuple(hidden.shape[:-1])
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise InputError(
            f"teacher_hidden is {tuple(teacher_hidden.shape)}; it must hold the student's tokens, {expected}, and its "
            "own width"
        )
    for name, t in (("mask", mask), ("token_weights", token_weights)):
        if t is not None and tuple(t.shape) != expected:
            raise InputError(f"{name} is {tuple(t.shape)}; it must be hidden's shape without the last, {expected}")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask is {mask.dtype}; it must be bool, write mask != 0")
    if token_weights is not None and not token_weights.is_floating_point():
        raise InputError(f"token_weights is {token_weights.dtype}; it must be floating, call token_weights.float()")


def check_devices(*tensors):
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise InputError(f"inputs lie on {sorted(map(str, devices))}; move them to one device")
