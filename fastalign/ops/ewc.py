"""Elastic weight consolidation: the quadratic penalty that holds parameters near where they were, by how much they
mattered there. As a loss term, as one fused pass that adds its gradient in place, and for LoRA on the merged weight.

Kirkpatrick et al. 2017, arXiv:1612.00796 (EWC); Schwarz et al. 2018, arXiv:1805.06370 (online EWC); Li et al. 2018,
arXiv:1802.01483 (L2-SP: Fisher information 1 everywhere).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign import reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.backends import cpu, pick

BACKENDS = ("auto", "torch", "cpu", "triton", "cuda")
# Of one block of the plain torch version: three of them stay in a core's cache.
_BLOCK = 1 << 16
# Of one tile of the merged LoRA weight.
_TILE_BYTES = 1 << 20


def ewc_penalty(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor] | None,
    strength: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """`strength / 2 * sum_i F_i (theta_i - theta0_i)^2` over all tensors, a scalar to be added to a loss.

    parameters (theta), anchors (theta0), fishers (F >= 0): as many tensors of pairwise the same shape; parameters and
    anchors float32, bfloat16, float16 or float64, fishers float32; fishers None: F = 1 (L2-SP). Returns a float32
    scalar (float64 if a parameter is), summed in float64. Where a gradient is wanted, the same pass forms it,
    `strength * F (theta - theta0)` in each parameter's dtype, and backward hands it over, times the factor by which the
    penalty enters the loss (16 bits are rounded once more by it, unless it is a power of two). So theta, theta0 and F
    are read once, or once more for each further backward over the same graph, and nothing waits for a GPU.

    To skip autograd and add to the gradients that are there, call `ewc_penalty_`. backend: "cpu" (C++: all tensors in
    one pass), "triton" or "cuda" (the same on a GPU), "torch" (any device) or "auto". InputError names lists or shapes
    that do not fit, BackendError a backend that cannot run.
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
    backend: str = "auto",
) -> Tensor:
    """`ewc_penalty`, whose gradient is added to each parameter's `.grad` (made where it is None) in the same pass.

    Each of theta, theta0, F and `.grad` is read once. Returns the penalty, detached. Arguments and errors are those of
    `ewc_penalty`. Call it once a step, when the loss's own gradients are there: it takes no part in autograd.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    backend = _checked(parameters, anchors, fishers, strength, backend, grads)
    fresh = [p.grad is None for p in parameters]
    for parameter, new in zip(parameters, fresh, strict=True):
        if new:
            parameter.grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    grads = [p.grad for p in parameters]
    return _run(backend, parameters, anchors, fishers, strength, grads, fresh)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wanted, strength, backend, anchors, fishers, *parameters):
        ctx.save_for_backward(*parameters)  # anchors and fishers are constants of the training run
        ctx.options = strength, backend, anchors, fishers
        ctx.grads = _like(parameters) if wanted else None
        return _run(backend, parameters, anchors, fishers, strength, ctx.grads, [True] * len(parameters))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads, ctx.grads = ctx.grads, None  # given away: backward may come again
        if grads is None:
            strength, backend, anchors, fishers = ctx.options
            grads = _like(ctx.saved_tensors)
            _run(backend, ctx.saved_tensors, anchors, fishers, strength, grads, [True] * len(grads))
        scale = float(grad) if grad.device.type == "cpu" else grad  # the value on a GPU would have to be waited for
        if isinstance(scale, Tensor) or scale != 1.0:
            torch._foreach_mul_(grads, scale)
        return None, None, None, None, None, *grads


def _like(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]


def _run(backend, parameters, anchors, fishers, strength, grads=None, fresh=None) -> Tensor:
    """The penalty; grads: where its gradient goes, over what is there unless `fresh`."""
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    if backend in pick.KERNELS:
        total = pick.KERNELS[backend].ewc_penalty(parameters, anchors, fishers, strength, grads, fresh)
        return (total * (strength / 2)).to(dtype)
    if backend == "cpu":
        return torch.tensor(_run_native(parameters, anchors, fishers, strength, grads, fresh), dtype=dtype)
    sums = []
    for i, (parameter, anchor) in enumerate(zip(parameters, anchors, strict=True)):
        fisher = None if fishers is None else fishers[i]
        grad = None if grads is None else grads[i]
        sums += _one_tensor(parameter, anchor, fisher, strength, grad, fresh is not None and fresh[i])
    return (torch.stack(sums).sum() * (strength / 2)).to(dtype)


def _run_native(parameters, anchors, fishers, strength, grads, fresh) -> float:
    kinds, alive = defaultdict(list), []  # tensors of the same dtypes go together
    for i, (parameter, anchor) in enumerate(zip(parameters, anchors, strict=True)):
        fisher = None if fishers is None else fishers[i].to(reference.compute_dtype(parameter))
        alive.append(fisher)
        addresses = [0 if t is None else t.data_ptr() for t in (parameter, anchor, fisher, grads and grads[i])]
        new = bool(grads and fresh[i])
        if new:  # its pages are not there yet: one by one they would take longer than what is written to them
            cpu.on_huge_pages(grads[i])
        kinds[parameter.dtype, anchor.dtype].append((parameter.numel(), *addresses, new))
    sums = [
        cpu.run("ewc_penalty", *map(cpu.dtype_code, kind), float(strength), tensors) for kind, tensors in kinds.items()
    ]
    return sum(sums) * strength / 2


def _one_tensor(parameter, anchor, fisher, strength, grad, fresh) -> list[Tensor]:
    """Sums of F (theta - theta0)^2 of a tensor's blocks, in float64; the gradient goes to `grad`."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    sums = []
    for theta, theta0, f, g in zip(*map(_blocks, (parameter, anchor, fisher, grad)), strict=False):
        distance = theta.to(dtype) - theta0.to(dtype)
        weighted = distance if f is None else distance * f.to(dtype)
        sums.append((weighted * distance).sum(dtype=torch.float64))
        if g is not None and fresh:
            g.copy_(weighted * strength)
        elif g is not None:
            g += weighted * strength
    return sums


def _blocks(t: Tensor | None) -> Iterable[Tensor | None]:
    """Runs of rows that fit a core's cache; None for ever where there is no tensor."""
    if t is None:
        return repeat(None)
    t = torch.atleast_1d(t)
    return t.split(max(1, _BLOCK // max(1, t[:1].numel())))


def lora_ewc_penalty(
    lora_a: Tensor, lora_b: Tensor, scaling: float, fisher: Tensor | None = None, strength: float = 1.0
) -> Tensor:
    """EWC on the weight that a LoRA adapter merges to: `strength / 2 * sum_ij F_ij (s B A)_ij^2`, a differentiable
    scalar, for one adapted layer.

    lora_a (r, in), lora_b (out, r), fisher (out, in) float32 of the layer's own weight, scaling s. `s B A` is how far
    the merged weight is from where it was; it is formed a tile of rows at a time, with its gradients
    `strength s B' (F * s B A)` and `strength s (F * s B A) A'`, so that F is read once and backward only scales them.
    fisher None (L2-SP): `strength s^2 / 2 * tr((B' B)(A A'))`, which never leaves r x r.

    Returns a float32 scalar (float64 for float64 adapters). InputError names a shape that does not fit.
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


def _why_not(backend, parameters, anchors, fishers, grads) -> str | None:
    """Why the kernel of this backend cannot take these tensors, or None."""
    tensors = [*parameters, *anchors, *(fishers or ()), *grads]
    if backend in pick.KERNELS:
        why = pick.KERNELS[backend].why_not(*tensors)
        if why is None and any(f.dtype != torch.float32 for f in fishers or ()):
            why = "a Fisher diagonal is not float32"
    else:
        why = cpu.why_not(*tensors) or cpu.why_no_kernel("ewc_penalty")
    if why:
        return why
    if not all(t.is_contiguous() for t in tensors):
        return "a tensor is not contiguous"
    for parameter, anchor in zip(parameters, anchors, strict=True):
        if anchor.dtype not in (parameter.dtype, reference.compute_dtype(parameter)):
            return f"an anchor is {anchor.dtype} for a {parameter.dtype} parameter"
    return None


def _check_strength(strength: float) -> None:
    if not (math.isfinite(strength) and strength >= 0):
        raise InputError(f"strength is {strength}; it must be a finite number of 0 or more")


def _checked(parameters, anchors, fishers, strength, backend, grads=()) -> str:
    """The backend to use; InputError or BackendError where the arguments do not fit."""
    _check_strength(strength)
    if not len(parameters):
        raise InputError("There are no parameters to hold: pass at least one tensor")
    for name, others in (("anchors", anchors), ("fishers", fishers)):
        if others is None and name == "fishers":
            continue
        if len(others) != len(parameters):
            raise InputError(f"There are {len(others)} {name} for {len(parameters)} parameters; give one for each")
        for i, (parameter, other) in enumerate(zip(parameters, others, strict=True)):
            if parameter.shape != other.shape or parameter.device != other.device:
                raise InputError(
                    f"{name}[{i}] is {tuple(other.shape)} on {other.device}, but its parameter is "
                    f"{tuple(parameter.shape)} on {parameter.device}; they must be alike"
                )
            if not parameter.is_floating_point() or not other.is_floating_point():
                raise InputError(
                    f"parameter {i} is {parameter.dtype}, {name}[{i}] {other.dtype}; both must be floating"
                )
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; ewc_penalty has {', '.join(BACKENDS)}")
    if backend == "torch":
        return backend
    on_gpu = pick.pick(*parameters, *anchors, *(fishers or ())) if backend == "auto" else None
    if on_gpu and _why_not(on_gpu, parameters, anchors, fishers, grads) is None:
        return on_gpu
    why = _why_not(backend, parameters, anchors, fishers, grads)
    if backend != "auto":
        if why:
            raise BackendError(f"backend={backend!r} cannot run ewc_penalty here: {why}")
        return backend
    return "torch" if why else "cpu"
