"""The Triton kernels (kernels/) seen from the ops: whether they can run, and which of them an op calls.

Triton is imported when a kernel is first used, never with fastalign. With TRITON_INTERPRET=1 in the environment before
that, the kernels are interpreted on the CPU, which is slow. The tests check them that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from fastalign.ops.backends.launch import why_not_on
from fastalign.ops.head import divergence_tiles
from fastalign.ops.head.epilogue import Epilogue, Stats, pick_rows


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    if find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA, or pip install triton"
    from fastalign.kernels.linear_logprobs import DEVICE as device

    hint = "" if device == "cpu" else "; TRITON_INTERPRET=1 in the environment interprets them on the CPU"
    return why_not_on(device, tensors, hint=hint)


def epilogue() -> Epilogue:
    """What the tiled driver of `linear_logprobs` runs between its products."""
    from fastalign.kernels import linear_logprobs as kernels

    def finish(weight, targets, transform, sums, **options) -> tuple[Tensor, Tensor, Stats]:
        picked = pick_rows(weight, targets) if options.get("a") is not None else (weight, targets)
        logprobs, entropies, stats = kernels.finish(*picked, transform, sums, **options)
        return logprobs, entropies, Stats(sums.shift, sums.others, *stats.unbind(0))

    return Epilogue(kernels.absorb, finish, kernels.softmax_gradient, kernels.kept_gradient, low_precision=True)


def divergence_epilogue() -> divergence_tiles.DivergenceEpilogue:
    """What the tiled driver of `linear_divergence` runs between its products."""
    from fastalign.kernels import linear_divergence as kernels

    return divergence_tiles.DivergenceEpilogue(kernels.normalise, kernels.terms, kernels.gradient)


def selective_logprobs(*args) -> tuple[Tensor, Tensor]:
    """The forward op of `selective_logprobs.py`."""
    from fastalign.kernels import selective_logprobs as kernels

    return kernels.selective_logprobs(*args)


def selective_logprobs_backward(*args, **options) -> Tensor:
    """The backward op of `selective_logprobs.py`."""
    from fastalign.kernels import selective_logprobs as kernels

    return kernels.selective_logprobs_backward(*args, **options)


def preference_loss(logprobs: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward op of `preference_loss.py`."""
    from fastalign.kernels import preference_loss as kernels

    with torch.cuda.device_of(logprobs):
        return kernels.preference_loss(logprobs, *args)


def preference_loss_backward(
    grad_losses: Tensor | None, grad_sums: Tensor | None, coefficients: Tensor, *args
) -> Tensor:
    """The backward op of `preference_loss.py`."""
    from fastalign.kernels import preference_loss as kernels

    with torch.cuda.device_of(coefficients):
        return kernels.preference_loss_backward(grad_losses, grad_sums, coefficients, *args)


def accumulate_fisher(fisher: Tensor, *args) -> None:
    """`accumulate_fisher_` in one launch."""
    from fastalign.kernels import accumulate_fisher as kernels

    with torch.cuda.device_of(fisher):
        kernels.accumulate_fisher(fisher, *args)


def ewc_penalty(parameters: Sequence[Tensor], *args) -> Tensor:
    """`sum_i F_i (theta_i - theta0_i)^2` and its gradient in one launch; see `ewc.py`."""
    from fastalign.kernels import ewc as kernels

    with torch.cuda.device_of(parameters[0]):
        return kernels.ewc_penalty(list(parameters), *args)
