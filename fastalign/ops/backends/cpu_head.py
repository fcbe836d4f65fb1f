"""The C++ kernels over an output layer, called from Python: log-probabilities, top-k log-probabilities, divergences.

Each function fills in a problem struct of csrc/cpu/base/problem.h with addresses, so the tensors behind them must live
until the kernel returns: that is what `alive` is for. `rows` (S,) int64 names the scored rows, None all of them; the
other rows of every result are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign import reference
from fastalign.ops.backends import cpu


def _panel(dtype: torch.dtype) -> int:
    """How many tokens lie side by side in one panel of the cached probabilities."""
    kernels = cpu.in_use.kernels
    return kernels.panel_f64 if dtype == torch.float64 else kernels.panel_f32


def cacheable_rows(rows: int, dtype: torch.dtype, row_bytes: int, memory_budget: int) -> int:
    """How many of `rows` have their probabilities cached within the budget: all, or as many whole panels as fit."""
    panel = _panel(dtype)
    return min(-(-rows // panel), memory_budget // row_bytes // panel) * panel


def cache_shifts(vocab: int) -> int:
    """How many shifts a row of cached probabilities has: one per vocabulary tile."""
    return -(-vocab // cpu.in_use.kernels.tile)


def _fill_in(
    problem: Any,
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) or (N, k) int64
    rows: Tensor | None,
    bias: Tensor | None,  # (V,)
    transform: Sequence[float | None],
    cache: Tensor | None = None,  # (C, V)
    shifts: Tensor | None = None,  # (C, tiles)
) -> tuple[Tensor | None, ...]:
    """Fill in what all passes share. Returns the tensors that must outlive the call.

    transform: logit_scale, softcap (None or 0: no cap) and temperature.
    """
    hidden, weight, targets = cpu.unit_stride(hidden), cpu.unit_stride(weight), targets.contiguous()
    bias = None if bias is None else bias.to(reference.compute_dtype(hidden)).contiguous()
    problem.dtype = cpu.dtype_code(hidden.dtype)
    problem.hidden, problem.hidden_stride = hidden.data_ptr(), hidden.stride(0)
    problem.weight, problem.weight_stride = weight.data_ptr(), weight.stride(0)
    problem.targets = targets.data_ptr()
    if targets.dim() > 1:
        problem.targets_per_token = targets.shape[1]
    problem.bias = cpu.address(bias)
    problem.rows = cpu.address(rows)
    problem.scored = len(targets) if rows is None else rows.numel()
    problem.vocab, problem.width = weight.shape
    problem.logit_scale, problem.softcap, problem.temperature = (number or 0.0 for number in transform)
    if cache is not None and shifts is not None and cache.numel():
        problem.cache, problem.shifts, problem.cache_rows = cache.data_ptr(), shifts.data_ptr(), cache.shape[0]
    return hidden, weight, targets, bias, rows


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    transform: Sequence[float | None],
    *,
    grads: bool,
    entropy: bool,
    cache_rows: int,
    entropy_grads: bool | None = None,
    details: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op of `linear_logprobs.py`.

    entropy_grads: Whether the entropy's gradient in hidden is computed too; None: where `grads` and `entropy` are set.
    details: (N, 3) or None. It receives the mean logit, log sum_j p_j^2, and 1 where the target is the first of the
    largest logits.
    """
    (n, width), vocab = hidden.shape, weight.shape[0]
    new = hidden.new_zeros if rows is not None else hidden.new_empty
    acc = reference.compute_dtype(hidden)
    logprobs, stats = new(n, dtype=acc), new(n, 5, dtype=acc)
    entropies = new(n if entropy else 0, dtype=acc)
    grad_logprobs = new((n, width) if grads else 0, dtype=acc)
    entropy_grads = grads and entropy if entropy_grads is None else entropy_grads
    grad_entropy = new((n, width) if entropy_grads else 0, dtype=acc)
    cache = cpu.on_huge_pages(hidden.new_empty((cache_rows, vocab) if cache_rows else 0))
    shifts = hidden.new_empty((cache_rows, cache_shifts(vocab)) if cache_rows else 0, dtype=acc)
    # A compiled graph sized the cache for all rows, but fewer turned out to be scored.
    scored = cacheable_rows(n if rows is None else rows.numel(), hidden.dtype, 1, 1 << 62)
    cache[scored:], shifts[scored:] = 0, 0
    problem = cpu.module.ForwardProblem()
    alive = _fill_in(problem, hidden, weight, targets, rows, bias, transform, cache, shifts)
    problem.logprobs, problem.stats = logprobs.data_ptr(), stats.data_ptr()
    problem.entropy = entropies.data_ptr() if entropy else 0
    problem.grad_logprobs = grad_logprobs.data_ptr() if grads else 0
    problem.grad_entropy = grad_entropy.data_ptr() if entropy_grads else 0
    if details is not None:
        problem.details = details.data_ptr()
    if problem.scored:
        cpu.run("forward", problem)
    del alive
    return logprobs, entropies, grad_logprobs, grad_entropy, stats, cache, shifts


def linear_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    cache: Tensor,
    shifts: Tensor,
    transform: Sequence[float | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward op of `linear_logprobs.py`: gradients in hidden, weight and bias, where `needs` says so."""
    acc = reference.compute_dtype(hidden)
    g_logprobs = grad_logprobs.to(acc).contiguous()
    g_entropy = None if grad_entropy is None else grad_entropy.to(acc).contiguous()
    d_hidden = hidden.new_zeros(hidden.shape, dtype=acc) if needs[0] else None
    d_weight = cpu.on_huge_pages(weight.new_empty(weight.shape)) if needs[1] else None
    d_bias = weight.new_empty(weight.shape[0], dtype=acc) if needs[2] else None
    problem = cpu.module.BackwardProblem()
    # The entropy's gradient needs the logits themselves, so it cannot use cached probabilities.
    alive = _fill_in(
        problem, hidden, weight, targets, rows, bias, transform, cache if g_entropy is None else None, shifts
    )
    problem.grad_logprobs, problem.stats = g_logprobs.data_ptr(), stats.data_ptr()
    problem.grad_entropy = cpu.address(g_entropy)
    problem.d_hidden, problem.d_weight, problem.d_bias = map(cpu.address, (d_hidden, d_weight, d_bias))
    _run_backward(problem, d_weight, d_bias)
    del alive
    return (
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        d_weight,
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def _run_backward(problem: Any, d_weight: Tensor | None, d_bias: Tensor | None) -> None:
    """Run the backward kernel. It writes d_weight and d_bias, which without any scored row are set to 0 here."""
    if problem.scored:
        cpu.run("backward", problem)
        return
    for t in (d_weight, d_bias):
        if t is not None:
            t.zero_()


def linear_topk_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    transform: Sequence[float | None],
    *,
    grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op of `sparse_divergence.py`; targets (N, k) must rise in each row.

    Returns:
        The logits of the targets (N, k), d log tail / d hidden (N, H) or an empty tensor, and (N, 2): the tail's shift
        and sum.
    """
    acc = reference.compute_dtype(hidden)
    new = hidden.new_zeros if rows is not None else hidden.new_empty
    picked, stats = new(targets.shape, dtype=acc), new(len(hidden), 2, dtype=acc)
    expected = new(hidden.shape if grads else 0, dtype=acc)
    problem = cpu.module.ForwardProblem()
    alive = _fill_in(problem, hidden, weight, targets, rows, bias, transform)
    problem.picked, problem.stats = picked.data_ptr(), stats.data_ptr()
    problem.grad_logprobs = expected.data_ptr() if grads else 0
    if problem.scored:
        cpu.run("forward", problem)
    del alive
    return picked, expected, stats


def linear_topk_logprobs_backward(
    grad_targets: Tensor,
    grad_tail: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    transform: Sequence[float | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in weight and bias from those in the targets' products and in the tail's logarithm.

    grad_targets: (N, k), in `h W' + b` of the targets. grad_tail: (N,).
    """
    d_weight = cpu.on_huge_pages(weight.new_empty(weight.shape)) if needs[0] else None
    d_bias = stats.new_empty(len(weight)) if needs[1] else None
    problem = cpu.module.BackwardProblem()
    inputs = grad_targets.contiguous(), grad_tail.contiguous(), stats.contiguous()
    alive = _fill_in(problem, hidden, weight, targets, None, bias, transform)
    problem.grad_targets, problem.grad_logprobs, problem.stats = map(cpu.address, inputs)
    problem.d_weight, problem.d_bias = cpu.address(d_weight), cpu.address(d_bias)
    _run_backward(problem, d_weight, d_bias)
    del alive, inputs
    return d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


# One side of a divergence: hidden (N, H), weight (V, H), bias (V,), and the numbers of its logit transform.
SideArguments = tuple[Tensor, Tensor, "Tensor | None", Sequence["float | None"]]


def linear_divergence(
    student: SideArguments,
    teacher: SideArguments,
    rows: Tensor | None,
    kind: str,
    jsd_beta: float,
    *,
    grads: bool,
    budget: int,
    coefficients: Tensor | None = None,
    needs: Sequence[bool] = (False, False),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The forward op of `linear_divergence.py`; both sides have the same vocabulary.

    Returns:
        Values (N,), grad_hidden (N, H) or an empty tensor, stats (N, 5), and, where `needs` says so, the gradients of
        `sum(coefficients * values)` in the student's weight and bias, in float32 or float64.
    """
    hidden, weight, *_ = student
    (n, width), acc = hidden.shape, reference.compute_dtype(hidden)
    new = hidden.new_zeros if rows is not None else hidden.new_empty
    values, stats = new(n, dtype=acc), new(n, 5, dtype=acc)
    grad_hidden = new((n, width) if grads else 0, dtype=acc)
    # The kernel writes whole panels and vectors: the gradients' rows are padded to them, and cut or added up below.
    vocab, lanes = len(weight), cpu.in_use.kernels.vector_bytes // values.element_size()
    padded = -(-width // _panel(hidden.dtype)) * _panel(hidden.dtype)
    d_weight = cpu.on_huge_pages(values.new_empty(vocab, padded)).zero_() if needs[0] else None
    d_bias = values.new_zeros(vocab, lanes) if needs[1] else None
    problem = cpu.module.DivergenceProblem()
    places = torch.empty(n, dtype=torch.int64)  # instead of targets, of which only the number is read
    alive: list[Any] = [
        _fill_in(part, h, w, places, rows, bias, transform)
        for part, (h, w, bias, transform) in ((problem.student, student), (problem.teacher, teacher))
    ]
    problem.dtype, problem.kind = cpu.dtype_code(hidden.dtype), reference.DIVERGENCES.index(kind)
    problem.beta, problem.budget = jsd_beta, budget
    problem.values, problem.stats = values.data_ptr(), stats.data_ptr()
    problem.grad_hidden = grad_hidden.data_ptr() if grads else 0
    if coefficients is not None and any(needs):
        coefficients = coefficients.to(acc).contiguous()
        problem.coefficients = coefficients.data_ptr()
        problem.d_weight, problem.d_bias = cpu.address(d_weight), cpu.address(d_bias)
    if problem.student.scored:
        cpu.run("divergence", problem)
    del alive
    return (
        values,
        grad_hidden,
        stats,
        None if d_weight is None else d_weight[:, :width].contiguous(),
        None if d_bias is None else d_bias.sum(1),
    )
