"""Token log-probabilities from logits that already exist: the gather, in one pass over the logits.

With z = logits / temperature, y the target, m the largest of the other logits and `others = sum_{v != y} exp(z_v - m)`,

    x = z_y - m - log others          the target's log-odds
    log p_y = log s(x)                s the logistic sigmoid
    d log p_y / d z_v = [v = y] - p_v = s(-x) * ([v = y] - [v != y] exp(z_v - m) / others)

The target stays out of the sum because 1 - p_y and log p_y lose every digit to cancellation where p_y is near 1. The
log-odds lose none. Top to bottom: schema, kernels, fakes, autograd, and the public function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.ops.backends import cpu, pick
from fastalign.ops.backends.pick import Backend
from fastalign.ops.head.checks import (
    check_devices,
    check_floating,
    check_ignore_index,
    check_target_ids,
    check_targets,
    check_temperature,
    check_vocabulary,
)
from fastalign.ops.head.tiling import row_slices

BACKENDS = ("auto", "reference", "torch", "cpu", "triton", "cuda")
# What the op's `int ignore_index` is where every target counts.
_NO_IGNORE_INDEX = -(1 << 63)
# The torch backend takes so many rows at a time that they have this many logits: no second [tokens, V] tensor exists.
_CHUNK = 1 << 22

_library = torch.library.Library("fastalign", "FRAGMENT")
# stats (..., 2) is what the backend's backward pass needs per row: for torch and cpu m (not divided by the temperature)
# and `others`.
_library.define(
    "selective_logprobs(Tensor logits, Tensor targets, float temperature, int ignore_index, str backend) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "selective_logprobs_backward(Tensor grad, Tensor logits, Tensor targets, Tensor stats, float temperature, "
    "int ignore_index, str backend) -> Tensor"
)
_library.define(
    "selective_logprobs_backward_(Tensor grad, Tensor(a!) logits, Tensor targets, Tensor stats, float temperature, "
    "int ignore_index, str backend) -> ()"
)


def _check_target_ids(targets: Tensor, vocab: int, ignore_index: int) -> None:
    given = None if ignore_index == _NO_IGNORE_INDEX else ignore_index
    check_target_ids(targets, vocab, given, op="selective_logprobs")


def _selective_logprobs(logits, targets, temperature, ignore_index, backend):
    _check_target_ids(targets, logits.shape[-1], ignore_index)
    if backend == "cpu":
        return cpu.selective_logprobs(logits, targets, temperature, ignore_index)
    if backend in pick.GPU_KERNELS:
        return _on_gpu(backend, logits, targets, temperature, ignore_index)
    dtype, vocab = reference.compute_dtype(logits), logits.shape[-1]
    ignored = targets == ignore_index
    logprobs, stats = logits.new_empty(targets.numel(), dtype=dtype), logits.new_empty(targets.numel(), 2, dtype=dtype)
    flat, y = logits.reshape(-1, vocab), targets.masked_fill(ignored, 0).reshape(-1, 1)
    for rows in _chunks(flat):
        others = flat[rows].to(dtype, copy=True)
        z = others.gather(1, y[rows])
        others.scatter_(1, y[rows], -math.inf)
        shift = others.amax(1, keepdim=True).clamp_(min=torch.finfo(dtype).min)  # -inf - -inf would be nan
        sums = others.sub_(shift).div_(temperature).exp_().sum(1, keepdim=True)
        stats[rows] = torch.cat([shift, sums], 1)
        # A logit that overflowed must not look like a certain target.
        odds = ((z - shift) / temperature - sums.log()).masked_fill_(z == math.inf, math.nan)
        logprobs[rows] = F.logsigmoid(odds).squeeze(1)
    return logprobs.view(targets.shape).masked_fill_(ignored, 0.0), stats.view(*targets.shape, 2)


def _on_gpu(backend, logits, targets, temperature, ignore_index):
    flat, kernels = logits.reshape(-1, logits.shape[-1]), pick.GPU_KERNELS[backend]
    with torch.cuda.device_of(logits):  # Triton launches on the current one
        logprobs, stats = kernels.selective_logprobs(flat, targets.reshape(-1), temperature, ignore_index)
    return logprobs.view(targets.shape), stats.view(*targets.shape, 2)


def _on_gpu_backward(backend, grad, logits, targets, stats, temperature, ignore_index, *, in_place):
    flat = logits.view(-1, logits.shape[-1]) if in_place else logits.reshape(-1, logits.shape[-1])
    rows, kernels = (grad.reshape(-1), flat, targets.reshape(-1), stats.view(-1, 2)), pick.GPU_KERNELS[backend]
    with torch.cuda.device_of(logits):
        return kernels.selective_logprobs_backward(*rows, temperature, ignore_index, in_place=in_place)


def _chunks(flat: Tensor) -> list[slice]:
    return row_slices(flat.shape[0], max(1, _CHUNK // max(flat.shape[1], 1)))


def _backward_into(out, grad, logits, targets, stats, temperature, ignore_index) -> None:
    """The gradient in `logits` (N, V) into `out`, which may be the logits."""
    ignored = (targets == ignore_index).unsqueeze(1)
    y, scale = targets.unsqueeze(1).masked_fill(ignored, 0), grad.unsqueeze(1) / temperature
    for rows in _chunks(logits):
        d = logits[rows].to(stats.dtype, copy=True)
        shift, others = stats[rows].split(1, 1)
        z = d.gather(1, y[rows])
        odds = ((z - shift) / temperature - others.log()).masked_fill_(z == math.inf, math.nan)
        miss = scale[rows] * torch.sigmoid(-odds)
        d.sub_(shift).div_(temperature).exp_().mul_(-miss / others.clamp(min=torch.finfo(d.dtype).tiny))
        out[rows] = d.scatter_(1, y[rows], miss).masked_fill_(ignored[rows], 0.0)  # 0 * nan is nan


def _selective_logprobs_backward(grad, logits, targets, stats, temperature, ignore_index, backend):
    if backend == "cpu":
        d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        cpu.selective_logprobs_backward(grad, logits, targets, stats, temperature, ignore_index, d_logits)
        return d_logits
    if backend in pick.GPU_KERNELS:
        d_logits = _on_gpu_backward(backend, grad, logits, targets, stats, temperature, ignore_index, in_place=False)
        return d_logits.view(logits.shape)
    flat = logits.reshape(-1, logits.shape[-1])
    d_logits = torch.empty_like(flat, memory_format=torch.contiguous_format)
    rows = grad.reshape(-1), flat, targets.reshape(-1), stats.view(-1, 2)
    _backward_into(d_logits, *rows, temperature, ignore_index)
    return d_logits.view(logits.shape)


def _selective_logprobs_backward_(grad, logits, targets, stats, temperature, ignore_index, backend):
    if backend == "cpu":
        cpu.selective_logprobs_backward(grad, logits, targets, stats, temperature, ignore_index, None)
        return torch.autograd.graph.increment_version(logits)  # autograd does not see writes to an address
    if backend in pick.GPU_KERNELS:
        _on_gpu_backward(backend, grad, logits, targets, stats, temperature, ignore_index, in_place=True)
        return torch.autograd.graph.increment_version(logits)
    flat = logits.view(-1, logits.shape[-1])
    rows = grad.reshape(-1), flat, targets.reshape(-1), stats.view(-1, 2)
    return _backward_into(flat, *rows, temperature, ignore_index)


_library.impl("selective_logprobs", _selective_logprobs, "CompositeExplicitAutograd")
_library.impl("selective_logprobs_backward", _selective_logprobs_backward, "CompositeExplicitAutograd")
_library.impl("selective_logprobs_backward_", _selective_logprobs_backward_, "CompositeExplicitAutograd")


@torch.library.register_fake("fastalign::selective_logprobs", lib=_library)
def _selective_logprobs_fake(logits, targets, temperature, ignore_index, backend):
    dtype = reference.compute_dtype(logits)
    logprobs = torch.empty_like(targets, dtype=dtype, memory_format=torch.contiguous_format)
    return logprobs, logprobs.new_empty(*targets.shape, 2)


@torch.library.register_fake("fastalign::selective_logprobs_backward", lib=_library)
def _selective_logprobs_backward_fake(grad, logits, targets, stats, temperature, ignore_index, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastalign::selective_logprobs_backward_", lib=_library)
def _selective_logprobs_backward_in_place_fake(grad, logits, targets, stats, temperature, ignore_index, backend):
    return None


class _SelectiveLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, ignore_index, in_place, backend):
        logprobs, stats = torch.ops.fastalign.selective_logprobs(logits, targets, temperature, ignore_index, backend)
        ctx.save_for_backward(logits, targets, stats)
        ctx.options, ctx.in_place = (temperature, ignore_index, backend), in_place
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, targets, stats = ctx.saved_tensors
        if ctx.in_place:
            logits = logits.detach()  # it shares the version counter, so autograd notices the change
            torch.ops.fastalign.selective_logprobs_backward_(grad, logits, targets, stats, *ctx.options)
            return logits, *[None] * 5
        d_logits = torch.ops.fastalign.selective_logprobs_backward(grad, logits, targets, stats, *ctx.options)
        return d_logits, *[None] * 5


def selective_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """The target's log-probability `z_y - logsumexp(z)` with `z = logits / temperature`, in one pass over the logits.

    It is differentiable (once) in the logits. `targets[i]` is the token that `logits[i]` predicts, the *next* one: from
    a model's logits (B, T, V) and input_ids (B, T) pass `logits[:, :-1]` and `input_ids[:, 1:]`.

    Args:
        logits: (..., V) floating.
        targets: (...) int64 in [0, V) or `ignore_index`.
        temperature: Divides the logits; above 0.
        ignore_index: The target of rows that do not count: those return 0 and get no gradient. None: all rows count.
        inplace_backward: Whether the backward pass overwrites the logits with their gradient, instead of allocating a
            second tensor of that size. It is meant for logits that nothing else reads afterwards. Autograd raises where
            another backward pass needs them, and on a second backward pass. It has no effect under torch.compile, which
            plans memory itself, nor on logits that are not contiguous.
        backend: "cpu" (C++), "triton" or "cuda" (on a GPU), "torch" (any device, some rows at a time), "reference", or
            "auto": on a GPU "cuda", else "triton", where either runs; on the CPU "cpu" where it is fast; else "torch".

    Returns:
        (...) nats in float32, or float64 for float64 logits; computed in that dtype. It is NaN where the target's logit
        is +inf, as of logits that overflowed: such a row has no distribution.

    Raises:
        InputError: A shape, dtype, target or option does not fit.
        BackendError: There is no such backend, or the backend that was named cannot run.
    """
    check_floating("logits", logits, "call logits.float()")
    check_vocabulary("logits", logits.shape, logits.shape[-1] if logits.dim() else 0)
    check_targets(targets, logits.shape[:-1], of="logits")
    check_devices(logits, targets)
    check_temperature(temperature)
    check_ignore_index(ignore_index)
    backend = pick.resolve("selective_logprobs", backend, logits, targets, cpu_kernel="selective_forward")
    if backend == "reference":
        check_target_ids(targets, logits.shape[-1], ignore_index, op="selective_logprobs")
        return reference.selective_logprobs(logits, targets, temperature=temperature, ignore_index=ignore_index)
    in_place = inplace_backward and not torch.compiler.is_compiling() and logits.is_contiguous()
    ignore_index = _NO_IGNORE_INDEX if ignore_index is None else ignore_index
    return _SelectiveLogprobs.apply(logits, targets, float(temperature), ignore_index, in_place, backend)
