"""The CUDA C++ kernels (csrc/cuda) seen from Python: whether they are built, and launches on raw pointers.

The compiled extension `fastalign._cuda` is named `module` here. Each launch goes to the tensors' device and to the
stream that is current there. Nothing here waits for a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.errors import BackendError
from fastalign.ops.backends.launch import GPU_DTYPES, why_not_on
from fastalign.ops.head import divergence_tiles
from fastalign.ops.head.epilogue import Coefficients, Epilogue, Stats, Sums, pick_rows
from fastalign.ops.head.transform import LogitTransform
from fastalign.reference import DIVERGENCES

try:
    from fastalign import _cuda as _extension
except ImportError:  # built without nvcc; `fastalign info` says so, and backend="cuda" raises
    _extension = None
module: Any = _extension

DTYPES = {dtype: code for code, dtype in enumerate(GPU_DTYPES)}  # DType of csrc/cuda/launchers.h
NOT_BUILT = "fastalign was built without CUDA: install nvcc (the CUDA toolkit) and run `make build`"


def describe() -> str:
    """One line about the kernels, for `fastalign info`."""
    return NOT_BUILT.replace("fastalign was built", "built") if module is None else f"built with {module.compiler}"


def why_not(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    return NOT_BUILT if module is None else why_not_on(module.device_type, tensors)


def _launch(kernel: str, problem: Any, at: Tensor, **fields: Tensor | list | tuple | float | None) -> None:
    """Fill in the problem's fields and launch it on `at`'s device and current stream.

    A tensor is passed as its address, None as 0.
    """
    for name, value in fields.items():
        setattr(problem, name, value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value)
    on_gpu = at.device.type == "cuda"
    stream = torch.cuda.current_stream(at.device).cuda_stream if on_gpu else 0
    run: Callable[[Any, int, int], None] = getattr(module, kernel)
    try:
        run(problem, at.device.index or 0, stream)
    except RuntimeError as error:
        raise BackendError(f"the CUDA kernel {kernel} could not be launched on {at.device}: {error}") from error


def _rows(t: Tensor) -> Tensor:
    """A matrix as the kernels take it: any distance between rows, no gaps inside a row."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _transform(transform: LogitTransform) -> tuple[float, float, float]:
    """The fields factor, inner and outer of csrc/cuda/launchers.h."""
    if transform.softcap is None:
        return transform.factor, 0.0, 0.0
    cap = transform.softcap
    return transform.factor, transform.logit_scale / cap, cap / transform.temperature


def _tile(
    u: Tensor, out: Tensor | None, targets: Tensor, first: int, bias: Tensor | None, transform: LogitTransform
) -> dict:
    """The fields of a `Tile`; see epilogue.py."""
    return {
        "from_dtype": DTYPES[u.dtype], "to_dtype": DTYPES[u.dtype if out is None else out.dtype],
        "u": u, "u_stride": u.stride(0), "targets": targets, "first": first, "rows": u.shape[0], "columns": u.shape[1],
        "bias": None if bias is None else bias.to(torch.float32), "head": _transform(transform),
    }  # fmt: skip


def absorb(
    u: Tensor,
    targets: Tensor,
    first: int,
    bias: Tensor | None,
    transform: LogitTransform,
    sums: Sums,
    *,
    entropy: bool = False,
    e: Tensor | None = None,
    ze: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    best: tuple[Tensor, Tensor] | None = None,
) -> None:
    """`epilogue.absorb` in one launch. u stays as it is where neither e nor ze lies in its memory."""
    matrices = {"e": e, "ze": ze, "a": a, "b": b}
    _launch(
        "absorb", module.Absorb(), u, **_tile(u, ze if e is None else e, targets, first, bias, transform),
        shift=sums.shift, others=sums.others, zothers=sums.zothers if entropy else None, target=sums.target,
        **matrices, **{f"{name}_stride": 0 if t is None else t.stride(0) for name, t in matrices.items()},
        width=0 if a is None else a.shape[1], best=best and best[0], best_index=best and best[1],
    )  # fmt: skip


def finish(
    weight: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    sums: Sums,
    *,
    entropy: bool = False,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """`epilogue.finish` in one launch."""
    rows, width = targets.shape[0], 0
    if a is not None:
        (weight, targets), width = pick_rows(weight, targets), a.shape[1]
    logprobs, entropies = (sums.shift.new_empty(rows) for _ in range(2))
    at_target, slope, mean = sums.shift.new_empty(3, rows).unbind(0)
    _launch(
        "finish", module.Finish(), logprobs, dtype=DTYPES[weight.dtype], weight=weight, weight_stride=weight.stride(0),
        targets=targets, rows=rows, width=width, head=_transform(transform), shift=sums.shift, others=sums.others,
        zothers=sums.zothers if entropy else None, target=sums.target, logprobs=logprobs, entropies=entropies,
        at_target=at_target, slope=slope, mean=mean, a=a, a_stride=0 if a is None else a.stride(0), b=b,
        b_stride=0 if b is None else b.stride(0),
    )  # fmt: skip
    return logprobs, entropies, Stats(sums.shift, sums.others, at_target, slope, mean)


def softmax_gradient(
    u: Tensor, targets: Tensor, first: int, bias: Tensor | None, transform: LogitTransform, c: Coefficients, du: Tensor
) -> None:
    """`epilogue.softmax_gradient` in one launch."""
    _launch(
        "softmax_gradient", module.Gradient(), u, **_tile(u, du, targets, first, bias, transform), shift=c.shift,
        mean=c.mean, logprobs=c.logprob_factor, entropy=c.entropy_factor, target=c.target, du=du,
        du_stride=du.stride(0),
    )  # fmt: skip


def kept_gradient(kept: Tensor, targets: Tensor, first: int, scale: Tensor, target: Tensor, du: Tensor) -> None:
    """`epilogue.kept_gradient` in one launch."""
    _launch(
        "kept_gradient", module.Gradient(), kept, **_tile(kept, du, targets, first, None, LogitTransform()),
        logprobs=scale, target=target, du=du, du_stride=du.stride(0),
    )  # fmt: skip


def epilogue() -> Epilogue:
    """What the tiled driver of `linear_logprobs` runs between its products."""
    return Epilogue(absorb, finish, softmax_gradient, kept_gradient, low_precision=True)


def selective_logprobs(logits: Tensor, targets: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """`z_y - logsumexp(z)` with `z = logits / temperature`, in one launch.

    Args:
        logits: (N, V).
        targets: (N,) int64.
        temperature: Divides the logits.
        ignore_index: The target of rows that do not count.

    Returns:
        logprobs (N,) float32: 0 where the target is `ignore_index`, NaN where it is outside the vocabulary. stats
        (N, 2): the logsumexp of the other logits, and the target's logit minus that.
    """
    logits, targets = _rows(logits), targets.contiguous()
    logprobs = logits.new_empty(logits.shape[0], dtype=torch.float32)
    stats = logits.new_empty(logits.shape[0], 2, dtype=torch.float32)
    _launch(
        "selective_logprobs", module.Gather(), logits, dtype=DTYPES[logits.dtype], logits=logits,
        stride=logits.stride(0), targets=targets, rows=logits.shape[0], vocab=logits.shape[1],
        ignore_index=ignore_index, factor=1 / temperature, logprobs=logprobs, stats=stats,
    )  # fmt: skip
    return logprobs, stats


def selective_logprobs_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    temperature: float,
    ignore_index: int,
    *,
    in_place: bool = False,
) -> Tensor:
    """`grad (onehot - p) / temperature` (N, V) in the logits' dtype; with `in_place` in the memory of the logits.

    It is 0 for rows whose target is `ignore_index` or outside the vocabulary.
    """
    rows = _rows(logits)
    out = rows if in_place or rows is not logits else torch.empty_like(rows, memory_format=torch.contiguous_format)
    targets, grad = targets.contiguous(), grad.to(torch.float32).contiguous()
    _launch(
        "selective_logprobs_backward", module.Gather(), logits, dtype=DTYPES[rows.dtype], logits=rows,
        stride=rows.stride(0), targets=targets, rows=rows.shape[0], vocab=rows.shape[1], ignore_index=ignore_index,
        factor=1 / temperature, stats=stats, grad=grad, grad_logits=out, grad_stride=out.stride(0),
    )  # fmt: skip
    if in_place and out is not logits:
        return logits.copy_(out)
    return out


def preference_loss(
    logprobs, cu_seqlens, ref_sums, lengths, labels, kl, form, averaged, alternating, beta, scale, offset, slope
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward op of `preference_loss.py` in float32: losses, rewards, sums, coefficients.

    Where cu_seqlens does not rise from 0 to the number of tokens, sums and losses are NaN, because an error could only
    be raised after waiting for the GPU.
    """
    named = {"logprobs": logprobs, "offsets": cu_seqlens, "ref_sums": ref_sums, "lengths": lengths, "labels": labels}
    given = {name: t if t is None else t.contiguous() for name, t in (named | {"kl": kl}).items()}
    sequences = cu_seqlens.shape[0] - 1
    items = sequences // 2 if labels is None else sequences
    losses = logprobs.new_empty(items)
    rewards, sums, coefficients = (logprobs.new_empty(count) for count in (sequences, sequences, logprobs.shape[0]))
    _launch(
        "preference_loss", module.Preference(), logprobs, **given, tokens=logprobs.shape[0], sequences=sequences,
        items=items, form=form, averaged=averaged, alternating=alternating, beta=beta, scale=scale, offset=offset,
        slope=slope, losses=losses, rewards=rewards, sums=sums, coefficients=coefficients,
    )  # fmt: skip
    return losses, rewards, sums, coefficients


def preference_loss_backward(
    grad_losses: Tensor | None,
    grad_sums: Tensor | None,
    coefficients: Tensor,
    cu_seqlens: Tensor,
    items: int,
    alternating: bool,
) -> Tensor:
    """The backward op of `preference_loss.py`."""
    named = {"grad_losses": grad_losses, "grad_sums": grad_sums, "coefficients": coefficients, "offsets": cu_seqlens}
    grad = torch.empty_like(coefficients, memory_format=torch.contiguous_format)
    _launch(
        "preference_loss_backward", module.Preference(), coefficients,
        **{name: t if t is None else t.contiguous() for name, t in named.items()}, tokens=coefficients.shape[0],
        sequences=cu_seqlens.shape[0] - 1, items=items, alternating=alternating, grad=grad,
    )  # fmt: skip
    return grad


def accumulate_fisher(fisher: Tensor, grad_output: Tensor, inputs: Tensor, cu_seqlens: Tensor) -> None:
    """`F += sum_s (G_s' X_s)^2` in one launch, on tensor cores.

    fisher (out, in) float32, grad_output (T, out) and inputs (T, in) of one dtype, cu_seqlens (S + 1,) int64.
    """
    grad_output, inputs = _rows(grad_output), _rows(inputs)
    _launch(
        "accumulate_fisher", module.Fisher(), fisher, dtype=DTYPES[inputs.dtype], fisher=fisher,
        grad_output=grad_output, input=inputs, fisher_stride=fisher.stride(0), grad_stride=grad_output.stride(0),
        input_stride=inputs.stride(0), offsets=cu_seqlens.contiguous(), tokens=inputs.shape[0],
        sequences=cu_seqlens.shape[0] - 1, rows=fisher.shape[0], columns=fisher.shape[1],
    )  # fmt: skip


def ewc_penalty(
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    fishers: Sequence[Tensor] | None,
    strength: float,
    grads: Sequence[Tensor] | None = None,
    fresh: Sequence[bool] | None = None,
) -> Tensor:
    """`sum_i F_i (theta_i - theta0_i)^2` over all tensors, a float64 scalar, and its gradient.

    The gradient `strength F (theta - theta0)` overwrites the grads, or is added to them where `fresh` is False. All
    tensors are contiguous and on one device; fishers are float32, and an anchor is in its parameter's dtype or float32.
    There is one launch per 64 tensors of the same dtypes.
    """
    groups = defaultdict(list)  # the tensors of the same dtypes go into one problem
    for i, (parameter, anchor) in enumerate(zip(parameters, anchors, strict=True)):
        addresses = [
            0 if t is None else t.data_ptr()
            for t in (parameter, anchor, None if fishers is None else fishers[i], None if grads is None else grads[i])
        ]
        new = bool(grads and fresh and fresh[i])
        groups[parameter.dtype, anchor.dtype].append((*addresses, parameter.numel(), new))
    sums = []
    for (theta, anchor), rows in groups.items():
        blocks = sum(-(-size // module.held_block) for *_, size, _ in rows)
        sums.append(torch.zeros(blocks, dtype=torch.float64, device=parameters[0].device))
        _launch(
            "ewc_penalty", module.Held(), parameters[0], theta_dtype=DTYPES[theta], anchor_dtype=DTYPES[anchor],
            strength=strength, tensors=rows, sums=sums[-1],
        )  # fmt: skip
    return torch.cat(sums).sum()


def divergence_epilogue() -> divergence_tiles.DivergenceEpilogue:
    """What the tiled driver of `linear_divergence` runs between its products."""
    return divergence_tiles.DivergenceEpilogue(divergence_normalise, divergence_terms, divergence_gradient)


def _tiles(a: Tensor, b: Tensor | None) -> dict:
    """The tile fields of a `Divergence`; see divergence_tiles.py."""
    stride = 0 if b is None else b.stride(0)
    rows, columns = a.shape
    return {"rows": rows, "columns": columns, "a": a, "a_stride": a.stride(0), "b": b, "b_stride": stride}


def divergence_normalise(z: Tensor, bias: Tensor | None, transform: LogitTransform, top: Tensor, total: Tensor) -> None:
    """Turn products z (R, T) float32 into logits in place, and fold them into the softmax's normaliser.

    Logits that the bias rules out become -1e30 and not -inf. top (R,) is the maximum so far and total (R,) is
    `sum exp(z - top)`; they start at -1e30 and 0.
    """
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    _launch(
        "divergence_normalise", module.Divergence(), z, **_tiles(z, None), head=_transform(transform), bias=bias,
        top=top, total=total,
    )  # fmt: skip


def divergence_terms(
    a: Tensor,
    b: Tensor,
    stats: Tensor,
    kind: str,
    beta: float,
    transform: LogitTransform,
    values: Tensor,
    moments: Tensor,
) -> None:
    """Add what a tile contributes to the divergences values (R,) and to their moments K (R,).

    a and b (R, T) hold the logits of student and teacher. They are overwritten with what the gradient is made of, times
    dz/du of a soft cap. For forward_kl: `s - t` in a. For reverse_kl and jsd: s in a, and s times its log-ratio to t or
    m in b. stats (R, 4 or more): the maximum and the log-sum of the student, then of the teacher.
    """
    _launch(
        "divergence_terms", module.Divergence(), a, **_tiles(a, b), kind=DIVERGENCES.index(kind), beta=beta,
        head=_transform(transform), stats=stats, stats_stride=stats.stride(0), values=values, moments=moments,
    )  # fmt: skip


def divergence_gradient(
    a: Tensor, b: Tensor | None, moments: Tensor, scale: float, coefficients: Tensor | None, out: Tensor
) -> None:
    """`scale a`, or `scale (b - moments a)` where b is given, times coefficients (R,) if given.

    The result goes to out (R, T) in out's dtype. out may lie in the memory of a, row by row.
    """
    _launch(
        "divergence_gradient", module.Divergence(), a, **_tiles(a, b), moments=moments, scale=scale,
        coefficients=coefficients, c=out, to_dtype=DTYPES[out.dtype], c_stride=out.stride(0),
    )  # fmt: skip
