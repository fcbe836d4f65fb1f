"""Every op over a vocabulary against its definition in float64: shapes, strides, dtypes, options, extreme numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comparing import DTYPES, Draw, compare, gradients, leaves
from torch import Tensor

import fastalign as fa
from fastalign import reference

BACKENDS = ("torch", "cpu", "auto")


def _head_options(draw: Draw, *names: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in names:
        if name.endswith("softcap") and draw.flag():
            options[name] = draw.one(0.5, 3.0, 30.0, 1e4)
        elif name.endswith("logit_scale") and draw.flag():
            options[name] = draw.one(0.1, -0.6, 2.0, 0.0)
        elif name == "temperature" and draw.flag():
            options[name] = draw.one(0.1, 0.7, 3.0)
    return options


def _size_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict) -> float:
    """The largest sum that a logit is made of: its rounding is a share of that."""
    if not hidden.numel():
        return 1.0
    h, w = hidden.double().nan_to_num(0, 0, 0), weight.double().nan_to_num(0, 0, 0)
    size = (h.abs() @ w.abs().T).max().item() + (
        0.0 if bias is None else bias.double().nan_to_num(0, 0, 0).abs().max().item()
    )
    return 1 + size * abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)


def _run(function: Callable, inputs: list, rest: tuple, options: dict, seed: Tensor, *, wide: bool) -> list[Tensor]:
    ours = leaves(*inputs, wide=wide)
    *matrices, bias = ours
    out = function(*matrices, *rest, bias=bias, **options)
    outputs = list(out) if isinstance(out, tuple) else [out]
    return [*outputs, *gradients(outputs, ours, seed)]


def linear_logprobs(draw: Draw) -> None:
    dtype, lead = draw.one(*DTYPES), draw.lead()
    width, vocab = draw.size(33, 1), draw.size(40, 1)
    spread = draw.one(0.1, 1.0, 10.0)
    hidden = draw.tensor(*lead, width, spread=spread, dtype=dtype, special=True)
    weight = draw.tensor(vocab, width, dtype=dtype)
    bias = draw.tensor(vocab, dtype=dtype) if draw.flag() else None
    ignore = draw.one(-100, None, 0)
    targets = draw.ids(*lead, below=vocab)
    if ignore is not None and targets.numel():
        targets[torch.rand(targets.shape, generator=draw.generator) < draw.one(0.0, 0.5, 1.0)] = ignore
    options = {
        "ignore_index": ignore,
        "entropy": draw.flag(),
        **_head_options(draw, "softcap", "logit_scale", "temperature"),
    }
    own = {"backend": draw.one(*BACKENDS), "memory_budget": draw.one(None, 0, 5000)}
    targets = targets.t().contiguous().t() if targets.dim() == 2 and draw.flag() else targets
    seed, inputs = torch.linspace(-1, 2, max(targets.numel(), 1), dtype=torch.float64), [hidden, weight, bias]

    def definition(hidden: Tensor, *args, **options):
        counts = torch.ones_like(targets, dtype=torch.bool) if ignore is None else targets != ignore
        return reference.linear_logprobs(_only(counts, hidden), *args, **options)

    ours = _run(fa.linear_logprobs, inputs, (targets,), {**options, **own}, seed, wide=False)
    plain, exact = (_run(definition, inputs, (targets,), options, seed, wide=w) for w in (False, True))
    size = _size_of_logits(hidden, weight, bias, options)
    rows, slope = max(targets.numel(), 1), abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
    by_weight, by_hidden = 4 * slope * size * 4, 4 * slope * size * rows * max(spread, 1) * 4
    scales = [
        size,
        *([size] if options["entropy"] else []),
        by_weight,
        by_hidden,
        *([by_hidden] if bias is not None else []),
    ]
    if dtype in (torch.bfloat16, torch.float16):  # probabilities are rounded to it between the products
        coarse = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        scales[1 + options["entropy"] :] = [s + coarse * slope * 16 for s in scales[1 + options["entropy"] :]]
    if options["entropy"]:
        scales = [scales[0], *(s * size for s in scales[1:])]
    compare(f"linear_logprobs {dtype} {own} {options}", ours, plain, exact, scales, 1 + options["entropy"])


def selective_logprobs(draw: Draw) -> None:
    dtype, lead, vocab = draw.one(*DTYPES), draw.lead(), draw.size(2100, 1)
    vocab = draw.one(vocab, 1023, 1024, 1025, 2100)
    spread = draw.one(0.1, 3.0, 300.0)
    logits = draw.tensor(*lead, vocab, spread=spread, dtype=dtype, special=True)
    targets = draw.ids(*lead, below=vocab)
    ignore = draw.one(-100, None, -1)
    if ignore is not None and targets.numel():
        targets[torch.rand(targets.shape, generator=draw.generator) < draw.one(0.0, 0.5, 1.0)] = ignore
    options = {"ignore_index": ignore, "temperature": draw.one(1.0, 0.1, 5.0)}
    own = {"backend": draw.one(*BACKENDS), "inplace_backward": draw.flag()}
    seed = torch.linspace(-1, 2, max(targets.numel(), 1), dtype=torch.float64)

    def definition(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        counts = torch.ones_like(targets, dtype=torch.bool) if ignore is None else targets != ignore
        return reference.selective_logprobs(_only(counts, logits), targets, **options)

    def run(function: Callable, wide: bool, **more: Any) -> list[Tensor]:
        (leaf,) = leaves(logits.clone() if more.get("inplace_backward") else logits, wide=wide)
        out = function(leaf, targets, **options, **more)
        return [out, *gradients([out], [leaf], seed)]

    ours, plain, exact = (
        run(fa.selective_logprobs, False, **own),
        *(run(definition, w) for w in (False, True)),
    )
    finite = logits.double().nan_to_num(0, 0, 0)
    size = 1 + (finite.abs().max().item() if finite.numel() else 0.0) / options["temperature"]
    compare(
        f"selective_logprobs {dtype} {own} {options}", ours, plain, exact, [size, 2 * size / options["temperature"]]
    )


def _per_token(draw: Draw, lead: tuple[int, ...]) -> dict[str, Tensor]:
    found = {}
    if draw.flag():
        found["mask"] = torch.rand(lead, generator=draw.generator) < draw.one(0.0, 0.5, 1.0)
    if draw.flag():
        weights = torch.rand(lead, generator=draw.generator)
        found["token_weights"] = torch.where(weights < 0.3, 0.0, weights)
    return found


def _counts(per_token: dict[str, Tensor], shape: torch.Size) -> Tensor:
    counts = torch.ones(shape, dtype=torch.bool)
    if "mask" in per_token:
        counts &= per_token["mask"]
    if "token_weights" in per_token:
        counts &= per_token["token_weights"] != 0
    return counts


def _only(counts: Tensor, rows: Tensor) -> Tensor:
    """The rows (..., H) that count, and zeros for all others: these may hold NaN, and 0 times NaN is NaN."""
    return torch.where(counts.unsqueeze(-1), rows, 0.0)


def _weighted(function: Callable, per_token: dict) -> Callable:
    """The definition on the rows that count, with the weights applied to its values."""

    def weighted(student: Tensor, *args, **options):
        counts = _counts(per_token, student.shape[:-1])
        if function is reference.linear_divergence:
            args = (args[0], _only(counts, args[1]), *args[2:])
        if function is reference.logits_divergence:
            args = (_only(counts, args[0]),)
        values = function(_only(counts, student), *args, **options)
        if "token_weights" in per_token:
            values = values * per_token["token_weights"].to(values.dtype)
        return values.masked_fill(~counts, 0.0)

    return weighted


def linear_divergence(draw: Draw) -> None:
    dtype, lead = draw.one(*DTYPES), draw.lead()
    width, other = draw.size(33, 1), draw.size(33, 1)
    vocab, theirs = draw.size(40, 1), draw.size(40, 1)
    hidden = draw.tensor(*lead, width, spread=draw.one(0.1, 1.0, 5.0), dtype=dtype, special=True)
    weight = draw.tensor(vocab, width, dtype=dtype)
    bias = draw.tensor(vocab, dtype=dtype) if draw.flag() else None
    teacher = (draw.tensor(*lead, other, dtype=dtype), draw.tensor(theirs, other, dtype=dtype))
    options = {
        "divergence": draw.one(*reference.DIVERGENCES), "jsd_beta": draw.one(0.1, 0.5, 0.9),
        **_head_options(draw, "softcap", "logit_scale", "temperature", "teacher_softcap", "teacher_logit_scale"),
    }  # fmt: skip
    per_token = _per_token(draw, lead)
    own = {"backend": draw.one(*BACKENDS), "memory_budget": draw.one(None, 0), **per_token}
    seed, inputs = torch.linspace(0.5, 2, max(hidden[..., 0].numel(), 1), dtype=torch.float64), [hidden, weight, bias]
    definition = _weighted(reference.linear_divergence, per_token)

    def run(function: Callable, more: dict, wide: bool) -> list[Tensor]:
        of_teacher = tuple(t.double() for t in teacher) if wide else teacher
        return _run(function, inputs, of_teacher, {**options, **more}, seed, wide=wide)

    ours, plain, exact = run(fa.linear_divergence, own, False), *(run(definition, {}, w) for w in (False, True))
    of_teacher = {k.removeprefix("teacher_"): v for k, v in options.items() if k.startswith("teacher_")}
    temperature = options.get("temperature", 1.0)
    size = _size_of_logits(hidden, weight, bias, options)
    size += _size_of_logits(*teacher, None, {**of_teacher, "temperature": temperature})
    slope, rows = abs(options.get("logit_scale", 1.0)) / temperature, max(hidden[..., 0].numel(), 1)
    scales = [
        size * size,
        16 * slope * size * size,
        16 * slope * size * size * rows * 5,
        16 * slope * size * size * rows,
    ]
    name = {k: v for k, v in own.items() if k in ("backend", "memory_budget")}
    compare(f"linear_divergence {dtype} {name} {options}", ours, plain, exact, scales[: len(ours)])


def logits_divergence(draw: Draw) -> None:
    dtype, lead = draw.one(*DTYPES), draw.lead()
    student = draw.tensor(*lead, draw.size(40, 1), spread=draw.one(0.1, 3.0, 30.0), dtype=dtype, special=True)
    teacher = draw.tensor(*lead, draw.size(40, 1), spread=draw.one(0.1, 3.0, 30.0), dtype=dtype, special=True)
    options = {
        "divergence": draw.one(*reference.DIVERGENCES), "jsd_beta": draw.one(0.1, 0.5, 0.9),
        "temperature": draw.one(1.0, 0.3, 4.0),
    }  # fmt: skip
    per_token = _per_token(draw, lead)
    own = {"inplace_backward": draw.flag(), **per_token}
    vocab = min(student.shape[-1], teacher.shape[-1])
    seed = torch.linspace(0.5, 2, max(student[..., 0].numel(), 1), dtype=torch.float64)
    definition = _weighted(reference.logits_divergence, per_token)

    def run(function: Callable, more: dict, wide: bool) -> list[Tensor]:
        (leaf,) = leaves(student.clone() if more.get("inplace_backward") else student, wide=wide)
        given = (leaf, teacher) if more else (leaf[..., :vocab], teacher[..., :vocab])
        out = function(*(t.double() if wide else t for t in given), **options, **more)
        return [out, *gradients([out], [leaf], seed)]

    ours, plain, exact = run(fa.logits_divergence, own, False), *(run(definition, {}, w) for w in (False, True))
    sizes = [t.double().nan_to_num(0, 0, 0).abs().max().item() if t.numel() else 0.0 for t in (student, teacher)]
    size = 1 + max(sizes) / options["temperature"]
    compare(
        f"logits_divergence {dtype} {options}",
        ours,
        plain,
        exact,
        [size * size, 4 * size * size / options["temperature"]],
    )


def _teacher_entries(draw: Draw, lead: tuple[int, ...], vocab: int) -> tuple[Tensor, Tensor]:
    rows = 1
    for n in lead:
        rows *= n
    k = min(vocab, draw.size(9, 1))
    order = (
        torch.stack([torch.randperm(vocab, generator=draw.generator) for _ in range(rows)])
        if rows
        else torch.zeros(0, vocab)
    )
    logprobs = draw.normal(rows, vocab, spread=2.0, dtype=torch.float64).log_softmax(-1)
    indices = order[:, :k].long()
    return indices.reshape(*lead, k), logprobs.gather(-1, indices).float().reshape(*lead, k)


def sparse_divergence(draw: Draw) -> None:
    dtype, lead = draw.one(*DTYPES), draw.lead()
    width, vocab = draw.size(33, 1), draw.size(40, 1)
    hidden = draw.tensor(*lead, width, spread=draw.one(0.1, 1.0, 5.0), dtype=dtype, special=True)
    weight = draw.tensor(vocab, width, dtype=dtype)
    bias = draw.tensor(vocab, dtype=dtype) if draw.flag() else None
    entries = _teacher_entries(draw, lead, vocab)
    options = {
        "divergence": draw.one(*reference.DIVERGENCES), "jsd_beta": draw.one(0.1, 0.5, 0.9),
        "tail": draw.one("lump", "drop"),
        **_head_options(draw, "softcap", "logit_scale", "temperature"),
    }  # fmt: skip
    per_token = _per_token(draw, lead)
    own = {"backend": draw.one(*BACKENDS), **per_token}
    seed, inputs = torch.linspace(0.5, 2, max(hidden[..., 0].numel(), 1), dtype=torch.float64), [hidden, weight, bias]
    definition = _weighted(reference.sparse_divergence, per_token)
    ours = _run(fa.sparse_divergence, inputs, entries, {**options, **own}, seed, wide=False)
    # The definition rounds the teacher's tail in float32, which may be 1e-7: judged against float64 alone.
    exact = _run(definition, inputs, entries, options, seed, wide=True)
    plain = [e.to(o.dtype) for e, o in zip(exact, ours, strict=True)]
    size, rows = _size_of_logits(hidden, weight, bias, options), max(hidden[..., 0].numel(), 1)
    slope = abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
    scales = [4 * size, 64 * slope * size * size, 64 * slope * size * size * rows * 5, 64 * slope * size * size * rows]
    compare(f"sparse_divergence {dtype} {own['backend']} {options}", ours, plain, exact, scales[: len(ours)])


def sparse_logits_divergence(draw: Draw) -> None:
    dtype, lead, vocab = draw.one(*DTYPES), draw.lead(), draw.size(40, 1)
    logits = draw.tensor(*lead, vocab, spread=draw.one(0.1, 3.0, 30.0), dtype=dtype, special=True)
    entries = _teacher_entries(draw, lead, vocab)
    options = {
        "divergence": draw.one(*reference.DIVERGENCES), "jsd_beta": draw.one(0.1, 0.5, 0.9),
        "tail": draw.one("lump", "drop"),
        "temperature": draw.one(1.0, 0.3, 4.0),
    }  # fmt: skip
    per_token = _per_token(draw, lead)
    seed = torch.linspace(0.5, 2, max(logits[..., 0].numel(), 1), dtype=torch.float64)
    definition = _weighted(reference.sparse_logits_divergence, per_token)

    def run(function: Callable, more: dict, wide: bool) -> list[Tensor]:
        (leaf,) = leaves(logits, wide=wide)
        out = function(leaf, *entries, **options, **more)
        return [out, *gradients([out], [leaf], seed)]

    ours, exact = run(fa.sparse_logits_divergence, per_token, False), run(definition, {}, True)
    plain = [e.to(o.dtype) for e, o in zip(exact, ours, strict=True)]
    finite = logits.double().nan_to_num(0, 0, 0)
    size = 1 + (finite.abs().max().item() if finite.numel() else 0.0) / options["temperature"]
    compare(
        f"sparse_logits_divergence {dtype} {options}",
        ours,
        plain,
        exact,
        [4 * size, 64 * size / options["temperature"]],
    )


CHECKS = {
    f.__name__: f
    for f in (
        linear_logprobs, selective_logprobs, linear_divergence, logits_divergence, sparse_divergence,
        sparse_logits_divergence,
    )
}  # fmt: skip
