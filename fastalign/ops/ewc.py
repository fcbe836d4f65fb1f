"""Elastic weight consolidation: a quadratic penalty that holds parameters near where they were.

How strongly it holds each parameter depends on how much that parameter mattered there: its Fisher information. There
are three forms: a loss term, one fused pass that adds the gradient in place, and a form for LoRA on the merged weight.

Kirkpatrick et al. 2017, arXiv:1612.00796 (EWC); Schwarz et al. 2018, arXiv:1805.06370 (online EWC); Li et al. 2018,
arXiv:1802.01483 (L2-SP: Fisher information 1 everywhere).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.errors import InputError
from fastalign.ops.backends import pick
from fastalign.ops.backends.pick import Backend

BACKENDS: tuple[Backend, ...] = ("auto", "torch", "cpu", "triton", "cuda")
# Elements of one block of the plain torch version: three such blocks stay in a core's cache.
_BLOCK = 1 << 16
# Bytes of one tile of the merged LoRA weight.
_TILE_BYTES = 1 << 20


def ewc_penalty(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor] | None,
    strength: float = 1.0,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """The penalty `strength / 2 * sum_i F_i (theta_i - theta0_i)^2` over all tensors, a scalar to add to a loss.

    Where a gradient is wanted, the same pass forms it: `strength * F (theta - theta0)` in each parameter's dtype.
    Backward returns it, times the factor by which the penalty enters the loss (in 16 bits that rounds once more, unless
    the factor is a power of two). So theta, theta0 and F are read once, and once more for each further backward pass
    over the same graph. Nothing waits for a GPU. To skip autograd and add to gradients that exist already, call
    `ewc_penalty_`.

    Args:
        parameters: theta, at least one tensor of float32, bfloat16, float16 or float64.
        anchors: theta0, as many tensors of the same shapes, floating.
        fishers: F >= 0, as many tensors of the same shapes, float32. None: F = 1 (L2-SP).
        strength: Finite, 0 or more.
        backend: "cpu" (C++: all tensors in one pass), "triton" or "cuda" (the same on a GPU), "torch" (any device), or
            "auto": the first of "cuda", "triton" and "cpu" that takes the tensors, else "torch".

    Returns:
        A float32 scalar (float64 if a parameter is float64), added up in float64.

    Raises:
        InputError: The lists or shapes do not fit.
        BackendError: There is no such backend, or the backend that was named cannot run.
    """
    backend = _checked(parameters, anchors, fishers, strength, backend)
    wanted = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    return _Penalty.apply(wanted, strength, backend, list(anchors), fishers and list(fishers), *parameters)


@torch.no_grad()
def ewc_penalty_(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor] | None,
    strength: float = 1.0,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """`ewc_penalty`, and its gradient added to each parameter's `.grad` in the same pass.

    A `.grad` that is None is created. Each of theta, theta0, F and `.grad` is read once. Call it once per step, when
    the loss's gradients are there: it takes no part in autograd.

    Args:
        parameters: See `ewc_penalty`.
        anchors: See `ewc_penalty`.
        fishers: See `ewc_penalty`.
        strength: See `ewc_penalty`.
        backend: See `ewc_penalty`.

    Returns:
        The penalty, detached.

    Raises:
        InputError: The lists or shapes do not fit.
        BackendError: There is no such backend, or the backend that was named cannot run.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    backend = _checked(parameters, anchors, fishers, strength, backend, grads)
    fresh = [p.grad is None for p in parameters]
    for parameter, new in zip(parameters, fresh, strict=True):
        if new:
            parameter.grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    grads = [p.grad for p in parameters if p.grad is not None]  # now of all parameters
    return _run(backend, parameters, anchors, fishers, strength, grads, fresh)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wanted, strength, backend, anchors, fishers, *parameters):
        ctx.save_for_backward(*parameters)  # anchors and fishers are constants of the training run
        ctx.options = strength, backend, anchors, fishers
        # The gradient strength F (theta - theta0) is formed together with the penalty, from one read of all tensors.
        # backward only scales it.
        ctx.grads = _like(parameters) if wanted else None
        return _run(backend, parameters, anchors, fishers, strength, ctx.grads, [True] * len(parameters))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads, ctx.grads = ctx.grads, None  # autograd owns them now; a second backward pass forms them again
        if grads is None:
            strength, backend, anchors, fishers = ctx.options
            grads = _like(ctx.saved_tensors)
            _run(backend, ctx.saved_tensors, anchors, fishers, strength, grads, [True] * len(grads))
        scale = float(grad) if grad.device.type == "cpu" else grad  # a value on a GPU would have to be waited for
        if isinstance(scale, Tensor) or scale != 1.0:
            torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage] - has no public name
        return None, None, None, None, None, *grads


def _like(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]


def _run(
    backend: Backend,
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor] | None,
    strength: float,
    grads: Sequence[Tensor] | None = None,
    fresh: Sequence[bool] | None = None,
) -> Tensor:
    """The penalty. Its gradient is added to the grads, or overwrites them where `fresh` is True."""
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    if backend in pick.KERNELS:
        total = pick.KERNELS[backend].ewc_penalty(parameters, anchors, fishers, strength, grads, fresh)
        return (total * (strength / 2)).to(dtype)
    sums = []
    for i, (parameter, anchor) in enumerate(zip(parameters, anchors, strict=True)):
        fisher = None if fishers is None else fishers[i]
        grad = None if grads is None else grads[i]
        sums += _one_tensor(parameter, anchor, fisher, strength, grad, fresh is not None and fresh[i])
    return (torch.stack(sums).sum() * (strength / 2)).to(dtype)


def _one_tensor(
    parameter: Tensor, anchor: Tensor, fisher: Tensor | None, strength: float, grad: Tensor | None, fresh: bool
) -> list[Tensor]:
    """The sums of F (theta - theta0)^2 of a tensor's blocks, in float64. The gradient goes to `grad`."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    sums = []
    blocks = _blocks(parameter), _blocks(anchor), _optional_blocks(fisher), _optional_blocks(grad)
    for theta, theta0, f, block_grad in zip(*blocks, strict=False):
        distance = theta.to(dtype) - theta0.to(dtype)
        weighted = distance if f is None else distance * f.to(dtype)
        sums.append((weighted * distance).sum(dtype=torch.float64))
        if block_grad is not None and fresh:
            block_grad.copy_(weighted * strength)
        elif block_grad is not None:
            block_grad.add_(weighted * strength)
    return sums


def _blocks(t: Tensor) -> Sequence[Tensor]:
    """Runs of rows that fit a core's cache."""
    t = torch.atleast_1d(t)
    return t.split(max(1, _BLOCK // max(1, t[:1].numel())))


def _optional_blocks(t: Tensor | None) -> Iterable[Tensor | None]:
    """The same, or None for ever where there is no tensor."""
    return repeat(None) if t is None else _blocks(t)


def lora_ewc_penalty(
    lora_a: Tensor, lora_b: Tensor, scaling: float, fisher: Tensor | None = None, strength: float = 1.0
) -> Tensor:
    """EWC on the weight that a LoRA adapter merges to: `strength / 2 * sum_ij F_ij (s B A)_ij^2`, for one layer.

    `s B A` is how far the merged weight is from where it was. It is formed a tile of rows at a time, together with its
    gradients `strength s B' (F * s B A)` and `strength s (F * s B A) A'`. So F is read once, and backward only scales.
    Without F (L2-SP) it is `strength s^2 / 2 * tr((B' B)(A A'))`, which never leaves r x r.

    Args:
        lora_a: (r, in) floating: A.
        lora_b: (out, r) floating: B.
        scaling: s.
        fisher: (out, in) float32, of the layer's weight; None: 1 everywhere.
        strength: Finite, 0 or more.

    Returns:
        A differentiable float32 scalar (float64 for float64 adapters).

    Raises:
        InputError: A shape or the strength does not fit.
    """
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise InputError(
            f"lora_a is {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)}; they must be (r, in) and (out, r)"
        )
    merged = lora_b.shape[0], lora_a.shape[1]
    if fisher is not None and tuple(fisher.shape) != merged:
        raise InputError(f"fisher is {tuple(fisher.shape)}; for this adapter's merged weight it must be {merged}")
    _check_strength(strength)
    if fisher is None:
        dtype = torch.promote_types(lora_a.dtype, torch.float32)
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        return ((b.T @ b) * (a @ a.T)).sum() * (strength * scaling**2 / 2)
    return _LoraPenalty.apply(lora_a, lora_b, float(scaling), fisher, float(strength))


class _LoraPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lora_a, lora_b, scaling, fisher, strength):
        dtype = torch.promote_types(lora_a.dtype, torch.float32)
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        grad_a, grad_b = torch.zeros_like(a), torch.empty_like(b)
        total = torch.zeros((), dtype=torch.float64, device=a.device)
        # The (out, in) weight s B A would be as large as the layer, so it exists only a tile of rows at a time.
        rows = max(1, _TILE_BYTES // (a.shape[1] * a.element_size()))
        for at in range(0, b.shape[0], rows):
            tile = slice(at, at + rows)
            distance = b[tile] @ a * scaling  # (rows, in)
            weighted = distance * fisher[tile].to(dtype)
            total += (weighted * distance).sum(dtype=torch.float64)
            torch.mm(weighted, a.T, out=grad_b[tile])
            grad_a.addmm_(b[tile].T, weighted)
        factor = strength * scaling
        ctx.save_for_backward(grad_a.mul_(factor).to(lora_a.dtype), grad_b.mul_(factor).to(lora_b.dtype))
        return (total * (strength / 2)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_a, grad_b = ctx.saved_tensors
        return grad_a * grad, grad_b * grad, None, None, None


def _check_strength(strength: float) -> None:
    if not (math.isfinite(strength) and strength >= 0):
        raise InputError(f"strength is {strength}; it must be a finite number of 0 or more")


def _check_alike(name: str, parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    if len(others) != len(parameters):
        raise InputError(f"There are {len(others)} {name} for {len(parameters)} parameters; give one for each")
    for i, (parameter, other) in enumerate(zip(parameters, others, strict=True)):
        if parameter.shape != other.shape or parameter.device != other.device:
            raise InputError(
                f"{name}[{i}] is {tuple(other.shape)} on {other.device}, but its parameter is "
                f"{tuple(parameter.shape)} on {parameter.device}; they must be alike"
            )
        if not parameter.is_floating_point() or not other.is_floating_point():
            raise InputError(f"parameter {i} is {parameter.dtype}, {name}[{i}] {other.dtype}; both must be floating")


def _checked(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor] | None,
    strength: float,
    backend: Backend,
    grads: Sequence[Tensor] = (),
) -> Backend:
    """Check the arguments; returns the backend to use."""
    _check_strength(strength)
    if not len(parameters):
        raise InputError("There are no parameters to hold: pass at least one tensor")
    _check_alike("anchors", parameters, anchors)
    if fishers is not None:
        _check_alike("fishers", parameters, fishers)
    tensors = [*parameters, *anchors, *(fishers or ()), *grads]

    def why_not(name: str) -> str | None:
        """What the kernels need besides dtypes and devices."""
        if name != "cpu" and any(f.dtype != torch.float32 for f in fishers or ()):
            return "a Fisher diagonal is not float32"
        if not all(t.is_contiguous() for t in tensors):
            return "a tensor is not contiguous"
        for parameter, anchor in zip(parameters, anchors, strict=True):
            if anchor.dtype not in (parameter.dtype, reference.compute_dtype(parameter)):
                return f"an anchor is {anchor.dtype} for a {parameter.dtype} parameter"
        return None

    return pick.resolve(
        "ewc_penalty", backend, *tensors, backends=BACKENDS, cpu_kernel="ewc_penalty", only_if_fast=False,
        why_not=why_not,
    )  # fmt: skip
