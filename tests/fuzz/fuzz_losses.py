"""Losses over log-probabilities and the ops around a model's layers, against their definitions in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comparing import Draw, compare, gradients, leaves
from torch import Tensor

import fastalign as fa
from fastalign import ops, reference
from fastalign.losses import PAIRWISE, options_of, pairwise_loss
from fastalign.ops.preference_loss import FORMULAS


def _logps(draw: Draw, *shape: int, dtype: torch.dtype, special: bool = True) -> Tensor:
    """Log-probabilities: mostly below 0, some at 0, far below, or not finite."""
    t = -draw.normal(*shape, spread=draw.one(0.01, 3.0, 200.0), dtype=dtype).abs()
    if special and t.numel() and draw.flag():
        t.view(-1)[draw.integer(0, t.numel() - 1)] = draw.one(0.0, -1e4, -1e-7, float("nan"), -float("inf"))
    return draw.relaid(t)


def loss_functions(draw: Draw) -> None:
    """Every loss over pairs, in float32 against itself in float64."""
    name, pairs = draw.one(*PAIRWISE), draw.size(9)
    dtype = draw.one(torch.float32, torch.float64)
    logps = [_logps(draw, pairs, dtype=dtype) for _ in range(4 if PAIRWISE[name].reference else 2)]
    lengths = [torch.randint(1, 9, (pairs,), generator=draw.generator).to(dtype) for _ in range(2)]
    options = {}
    if "beta" in options_of(name) and draw.flag():
        options["beta"] = draw.one(1e-3, 0.1, 1.0, 30.0)
    if "label_smoothing" in options_of(name) and draw.flag():
        options["label_smoothing"] = draw.one(0.0, 0.1, 0.49)
    seed = torch.linspace(0.5, 2, max(pairs, 1), dtype=torch.float64)

    def run(wide: bool) -> list[Tensor]:
        given, sizes = leaves(*logps, wide=wide), [t.double() if wide else t for t in lengths]
        out = pairwise_loss(name, None, *given, lengths_chosen=sizes[0], lengths_rejected=sizes[1], options=options)
        return [out, *gradients([out], given[:2], seed)]

    ours, exact = run(False), run(True)
    if name in ("aot", "aot_unpaired"):  # they sort: two values that float32 takes for equal may change places
        return
    size = 1 + sum(t.double().nan_to_num(0, 0, 0).abs().max().item() if pairs else 0.0 for t in logps)
    beta = options.get("beta", options_of(name).get("beta", 1.0))
    scale = (1 + beta) ** 2 * size**2
    # The exponentials of dpo_alpha and others turn the rounding of an exponent into that of their value. Values beyond
    # 1e9 are no losses any more: there the order of magnitude is enough.
    largest = [e.nan_to_num(0, 0, 0).abs().max().item() if pairs else 0.0 for e in exact]
    scales = [scale + (size * (1 + beta) if e < 1e9 else 1e6) * e for e in largest]
    compare(f"{name} {dtype} {options}", ours, [e.to(dtype) for e in exact], exact, scales)


def preference_loss(draw: Draw) -> None:
    """The op over packed sequences: its backends against the one that is the definition."""
    name, pairs = draw.one(*(n for n in FORMULAS if n != "kto")), draw.size(9)
    dtype = draw.one(torch.float32, torch.float64)
    lengths = torch.randint(0, 6, (2 * pairs,), generator=draw.generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(draw.one(torch.int64, torch.int32))
    tokens = _logps(draw, int(offsets[-1]), dtype=dtype)
    ref = _logps(draw, 2 * pairs, dtype=dtype) if PAIRWISE[name].reference else None
    options = {"beta": draw.one(0.01, 0.1, 2.0)} if "beta" in options_of(name) else {}
    options |= {"alternating": draw.flag(), "averaged": draw.one(None, True, False)}
    seed = torch.linspace(0.5, 2, max(pairs, 1), dtype=torch.float64)

    def run(backend: str, wide: bool) -> list[Tensor]:
        (leaf,) = leaves(tokens, wide=wide)
        of_reference = ref.double() if wide and ref is not None else ref
        out = fa.preference_loss(leaf, offsets, of_reference, loss_type=name, backend=backend, **options)
        return [out.losses, *gradients([out.losses], [leaf], seed)]

    ours, plain, exact = run(draw.one("torch", "cpu", "auto"), False), *(run("reference", w) for w in (False, True))
    if not exact[0].isfinite().all():  # a loss of NaN is seen, and what its gradient is matters no more
        ours, plain, exact = ours[:1], plain[:1], exact[:1]
    sizes = [t.double().nan_to_num(0, 0, 0).abs().sum().item() for t in (tokens, ref) if t is not None]
    scale = (1 + sum(sizes)) ** 2 * 3
    compare(f"preference_loss {name} {dtype} {options}", ours, plain, exact, [scale, scale][: len(ours)])


def fused_losses(draw: Draw) -> None:
    """Hidden states to a preference loss, against the definition's log-probabilities and loss."""
    name = draw.one(*(n for n in PAIRWISE if n not in ("aot", "aot_unpaired")))
    pairs, length, width, vocab = draw.integer(1, 4), draw.integer(1, 6), draw.size(17, 1), draw.size(33, 2)
    dtype = draw.one(torch.float32, torch.float64)
    rows = 2 * pairs
    hidden, weight = draw.normal(rows, length, width, dtype=dtype), draw.relaid(draw.normal(vocab, width, dtype=dtype))
    hidden = draw.relaid(hidden)
    targets = draw.ids(rows, length, below=vocab)
    targets[:, 1:][torch.rand(rows, length - 1, generator=draw.generator) < 0.3] = -100
    ref = _logps(draw, rows, dtype=dtype, special=False) if PAIRWISE[name].reference else None
    seed = torch.ones(1, dtype=torch.float64)

    def ours() -> list[Tensor]:
        given = leaves(hidden, weight)
        out = fa.fused_linear_preference(*given, targets, loss_type=name, **({} if ref is None else {"ref_logps": ref}))
        return [out.loss, *gradients([out.loss], given, seed)]

    def exact() -> list[Tensor]:
        h, w = leaves(hidden, weight, wide=True)
        tokens, counts = reference.linear_logprobs(h, w, targets), (targets != -100).sum(1).double()
        references = () if ref is None else ref.double().chunk(2)
        lengths = dict(zip(("lengths_chosen", "lengths_rejected"), counts.chunk(2), strict=True))
        each = pairwise_loss(name, None, *tokens.sum(1).chunk(2), *references, **lengths)
        loss = each.mean()
        return [loss, *gradients([loss], [h, w], seed)]

    found, truth = ours(), exact()
    size = 1 + (hidden.double().abs().sum(-1).max() * weight.double().abs().max()).item() * length
    size += 0.0 if ref is None else ref.abs().max().item()
    compare(f"fused {name} {dtype}", found, [e.to(dtype) for e in truth], truth, [4 * size**2] * 3)


def segment_sum(draw: Draw) -> None:
    """Sums of packed sequences."""
    dtype, lengths = (
        draw.one(torch.float32, torch.float64),
        torch.randint(0, 9, (draw.size(17),), generator=draw.generator),
    )
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values, seed = (
        draw.tensor(int(offsets[-1]), dtype=dtype, special=True),
        torch.linspace(-1, 2, 20, dtype=torch.float64),
    )

    def run(function: Callable, wide: bool, **more: Any) -> list[Tensor]:
        (leaf,) = leaves(values, wide=wide)
        out = function(leaf, offsets, **more)
        return [out, *gradients([out], [leaf], seed)]

    ours, exact = run(fa.segment_sum, False, backend=draw.one("torch", "cpu", "auto")), run(reference.segment_sum, True)
    size = 1 + values.double().nan_to_num(0, 0, 0).abs().sum().item()
    compare(f"segment_sum {dtype}", ours, [e.to(dtype) for e in exact], exact, [size, 3.0])


def rms_norm(draw: Draw) -> None:
    """Norms of rows of any width."""
    dtype = draw.one(torch.float32, torch.float64, torch.bfloat16, torch.float16)
    lead, width = draw.lead(), draw.size(40, 1)
    x, weight = draw.tensor(*lead, width, dtype=dtype, special=True), draw.tensor(width, dtype=dtype)
    eps, seed = draw.one(1e-6, 1e-5), torch.linspace(-1, 2, 4000, dtype=torch.float64)

    def run(function: Callable, wide: bool, **more: Any) -> list[Tensor]:
        given = leaves(x, weight, wide=wide)
        out = function(*given, eps, **more)
        return [out, *gradients([out.double()], given, seed)]

    ours, plain = run(ops.rms_norm, False, backend=draw.one("torch", "cpu", "auto")), run(reference.rms_norm, False)
    exact = run(reference.rms_norm, True)
    rounded = (
        torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype not in (torch.float32, torch.float64) else 1.0
    )
    tiny = 1 + 1 / max(x.double().nan_to_num(0, 0, 0).square().mean(-1).min().item(), eps) ** 0.5 if x.numel() else 1.0
    scales = [9 * rounded, 40 * rounded * tiny, 40 * rounded * max(x.numel(), 1)]
    compare(f"rms_norm {dtype}", ours, plain, exact, scales)


def swiglu(draw: Draw) -> None:
    """silu(gate) * up of any shape."""
    dtype = draw.one(torch.float32, torch.float64, torch.bfloat16, torch.float16)
    lead, spread = draw.lead(), draw.one(0.1, 3.0, 60.0)
    gate, up = (draw.tensor(*lead, spread=spread, dtype=dtype, special=True) for _ in range(2))
    seed = torch.linspace(-1, 2, 4000, dtype=torch.float64)

    def run(function: Callable, wide: bool, **more: Any) -> list[Tensor]:
        given = leaves(gate, up, wide=wide)
        out = function(*given, **more)
        return [out, *gradients([out.double()], given, seed)]

    ours, plain = run(ops.swiglu, False, backend=draw.one("torch", "cpu", "auto")), run(reference.swiglu, False)
    exact = run(reference.swiglu, True)
    rounded = (
        torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype not in (torch.float32, torch.float64) else 1.0
    )
    sizes = [1 + (t.double().nan_to_num(0, 0, 0).abs().max().item() if t.numel() else 0.0) for t in (gate, up)]
    compare(f"swiglu {dtype}", ours, plain, exact, [4 * rounded * sizes[0] * sizes[1]] * 3)


def accumulate_fisher(draw: Draw) -> None:
    """Squared gradients of sequences, some of them empty, of one token, or beside tokens of none."""
    dtype = draw.one(torch.float32, torch.float64, torch.bfloat16)
    out, width, tokens = draw.size(33, 1), draw.size(33, 1), draw.size(40)
    grad, inputs = draw.tensor(tokens, out, dtype=dtype), draw.tensor(tokens, width, dtype=dtype)
    cuts = torch.randint(0, tokens + 1, (draw.integer(1, 6),), generator=draw.generator).sort().values
    if draw.flag():
        cuts = torch.arange(tokens + 1)
    fisher = torch.rand(out, width, generator=draw.generator).to(reference.compute_dtype(grad))
    exact = reference.accumulate_fisher(fisher.double(), grad.double(), inputs.double(), cuts)
    ours = fa.accumulate_fisher_(
        fisher.clone(), grad, inputs, cuts, backend=draw.one("torch", "cpu", "auto", "reference")
    )
    size = 1 + (tokens * (grad.double().abs().max() * inputs.double().abs().max()).item()) ** 2 if tokens else 1.0
    compare(f"accumulate_fisher_ {dtype}", [ours], [exact.to(ours.dtype)], [exact], [size])


def ewc_penalty(draw: Draw) -> None:
    """Penalties over several tensors, empty ones too, in a mixture of dtypes."""
    dtype = draw.one(torch.float32, torch.float64, torch.bfloat16)
    shapes = [(draw.size(9), draw.size(40)) for _ in range(draw.integer(1, 3))]
    theta, anchors = ([draw.tensor(*shape, dtype=dtype) for shape in shapes] for _ in range(2))
    fishers = [draw.tensor(*shape).abs() for shape in shapes] if draw.flag() else None
    strength, seed = draw.one(0.0, 0.1, 100.0), torch.ones(1, dtype=torch.float64)

    def run(function: Callable, wide: bool, **more: Any) -> list[Tensor]:
        given = leaves(*theta, wide=wide)
        others = [[t.double() if wide else t for t in ts] if ts is not None else None for ts in (anchors, fishers)]
        out = function(given, *others, strength, **more)
        return [out, *gradients([out], given, seed)]

    ours, exact = run(fa.ewc_penalty, False), run(reference.ewc_penalty, True)
    size = 1 + strength * 30 * sum(t.numel() for t in theta)
    scales = [size] + [strength * 30 + 1] * len(theta)
    compare(f"ewc_penalty {dtype}", ours, [e.to(o.dtype) for e, o in zip(exact, ours, strict=True)], exact, scales)


def segment_attention(draw: Draw) -> None:
    """Attention of packed rows with shared prefixes."""
    from fastalign.ops.segment_attention import segment_attention as ours_of

    dtype, key_heads, shared = draw.one(torch.float32, torch.bfloat16), draw.integer(1, 2), draw.integer(1, 3)
    width, value_width = draw.size(17, 1), draw.size(17, 1)
    rows, at = [], 0
    for _ in range(draw.integer(1, 3)):
        prefix, first = draw.integer(0, 9), at
        if prefix:
            rows.append((at, prefix, at, 0))
            at += prefix
        for _ in range(draw.integer(0 if prefix else 1, 3)):
            length = draw.integer(1, 9)
            rows.append((at, length, first, prefix))
            at += length
    segments = torch.tensor(rows)
    query = draw.normal(1, key_heads * shared, at, width, dtype=dtype)
    key, value = (
        draw.normal(1, key_heads, at, width, dtype=dtype),
        draw.normal(1, key_heads, at, value_width, dtype=dtype),
    )
    window, seed = draw.one(None, 1, 4), torch.linspace(-1, 2, 40000, dtype=torch.float64)

    def run(function: Callable, wide: bool, **more: Any) -> list[Tensor]:
        given = leaves(query, key, value, wide=wide)
        out = function(*given, segments, window, draw_scaling, **more)
        return [out, *gradients([out.double()], given, seed)]

    draw_scaling = draw.one(0.1, 1.0)
    ours = run(ours_of, False, backend=draw.one("torch", "cpu", "auto"))
    plain, exact = run(reference.segment_attention, False), run(reference.segment_attention, True)
    rounded = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype != torch.float32 else 1.0
    compare(f"segment_attention {dtype}", ours, plain, exact, [100 * rounded * width] * 4)


CHECKS = {
    f.__name__: f
    for f in (
        loss_functions, preference_loss, fused_losses, segment_sum, rms_norm, swiglu, accumulate_fisher, ewc_penalty,
        segment_attention,
    )
}  # fmt: skip
