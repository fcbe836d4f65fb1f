"""What the tiled driver must do and move, and the times that follow on GPUs that are not at hand: predictions.

The statement is exact: tests/bench/harness/test_model.py counts the driver's own calls, FLOP and bytes and holds them
to it, tests/cuda/test_launches.py the launches of every op. A step's time is the largest of its FLOP at the rate of a
good matrix product, and its operands and tiles at the rate of the memory; steps follow one another. What was measured
on a GPU is in docs/explanation/gpu.md.
"""

from __future__ import annotations

from typing import NamedTuple

from fastalign.ops.head.tiling import gpu_tile_shape

MODES = ("frozen", "cached", "recomputed")


class Step(NamedTuple):
    """All calls of one kind over a whole pass."""

    calls: int
    flop: int = 0
    operands: int = 0  # bytes of hidden, weight, accumulators and kept probabilities, each as often as it is read
    tiles: int = 0  # bytes of tiles, which a product or epilogue has just written


def linear_logprobs(
    n: int, h: int, v: int, tile: tuple[int, int], mode: str, element: int = 2
) -> tuple[dict[str, Step], dict[str, Step]]:
    """Steps of (forward, backward) for N rows, a multiple of 16, of `element` bytes a number, without an entropy.

    "frozen": forward keeps d logprob / d hidden. "cached", "recomputed": a trainable head, with all probabilities kept
    for the backward pass, or none.
    """
    rows, columns = -(-n // tile[0]), -(-v // tile[1])
    calls, u = rows * columns, 2 * n * v * h
    hidden, weight = n * h * element * columns, v * h * element * rows
    sums, gradient = 2 * 4 * n * h * columns, 2 * 4 * v * h * rows  # read and written once a tile, in float32
    logits, probabilities = 4 * n * v, element * n * v
    product = Step(calls, u, hidden + weight, logits)
    fold = Step(calls, u, weight + sums, probabilities)
    if mode == "frozen":
        absorb = Step(calls, 0, 0, logits + probabilities)
        ended = Step(rows, 0, (2 * 4 + element) * n * h)
        return {"logits": product, "absorb": absorb, "fold": fold, "finish": ended}, {}
    ends = {"fold": fold, "weight": Step(calls, u, hidden + gradient, probabilities)}
    if mode == "cached":
        absorb = Step(calls, 0, probabilities, logits)
        kept = {"kept_gradient": Step(calls, 0, probabilities, probabilities)}
        return {"logits": product, "absorb": absorb, "finish": Step(rows)}, kept | ends
    absorb = Step(calls, 0, 0, logits + probabilities)
    again = {"logits": product, "softmax_gradient": Step(calls, 0, 0, logits + probabilities)}
    return {"logits": product, "absorb": absorb, "finish": Step(rows)}, again | ends


def linear_divergence(
    n: int, h: int, g: int, v: int, tile: tuple[int, int], kind: str, element: int = 2
) -> dict[str, Step]:
    """Steps of the forward pass, frozen student head: N rows, student width H, teacher width G. `tile`: the rows of a
    block, whose logits of both sides are held, and the vocabulary entries of a tile; such tiles outgrow the cache.
    """
    rows, columns = -(-n // tile[0]), -(-v // tile[1])
    calls, logits, sides = rows * columns, 4 * n * v, 1 if kind == "forward_kl" else 2

    def product(width: int) -> Step:
        return Step(calls, 2 * n * v * width, (n * columns + v * rows) * width * element + logits)

    return {
        "student": product(h), "teacher": product(g),
        "normalise": Step(2 * calls, 0, 4 * logits),
        "terms": Step(calls, 0, (2 + sides) * logits),
        "gradient": Step(calls, 0, sides * logits + element * n * v),
        "fold": Step(calls, 2 * n * v * h, element * n * v + v * h * element * rows + 2 * 4 * n * h * columns),
    }  # fmt: skip


def selective_logprobs(n: int, v: int, element: int = 2) -> tuple[Step, Step]:
    """(forward, backward): the logits are read once, and once more with their gradient written."""
    return Step(1, 0, n * v * element), Step(1, 0, 2 * n * v * element)


def preference_loss(tokens: int) -> tuple[Step, Step]:
    """(forward, backward): log-probs in and coefficients out, coefficients in and gradients out."""
    return Step(1, 0, 2 * 4 * tokens), Step(1, 0, 2 * 4 * tokens)


def accumulate_fisher(tokens: int, out: int, width: int, tile: tuple[int, int] = (128, 64), element: int = 2) -> Step:
    """F is read and written once; each operand is read once for each tile of F beside it."""
    operands = tokens * (out * -(-width // tile[1]) + width * -(-out // tile[0])) * element
    return Step(1, 2 * tokens * out * width, operands + 2 * 4 * out * width)


class Device(NamedTuple):
    """Figures of the data sheet, and what is assumed of them."""

    name: str
    peak: float  # bfloat16 FLOP/s with float32 sums, dense
    memory: float  # bytes/s
    memory_bytes: int


DEVICES = {
    "h200": Device("H200 SXM", 989e12, 4.8e12, 141 << 30),
    "h100": Device("H100 SXM", 989e12, 3.35e12, 80 << 30),
    "a100": Device("A100 80 GB SXM", 312e12, 2.04e12, 80 << 30),
    "rtx4090": Device("RTX 4090", 165e12, 1.01e12, 24 << 30),
}
# The share of its peak that a large product reaches: what the published 42 ms for three products on an H100 come to.
PRODUCT_SHARE = 0.74
# A kernel's start and the run-out of the one before, in seconds: assumed.
GAP = 3e-6
# Milliseconds that others published for an H100, forward and backward: (N, H, V), whose, of what.
PUBLISHED = {
    (16384, 4096, 131072): (104.8, "Liger, its SM90 kernel"),
    (8192, 4096, 151936): (42.0, "TRL, the products of the head alone"),
}


def seconds(step: Step, device: Device) -> float:
    rate = device.peak * PRODUCT_SHARE
    return max(step.flop / rate, (step.operands + step.tiles) / device.memory) + step.calls * GAP


def predict(n: int, h: int, v: int, mode: str, device: Device) -> tuple[float, float]:
    """Seconds of (forward, backward)."""
    passes = linear_logprobs(n, h, v, gpu_tile_shape(device.memory_bytes), mode)
    return tuple(sum(seconds(step, device) for step in steps.values()) for steps in passes)


def table(name: str) -> str:
    """The predictions for one device beside what others published."""
    device = DEVICES[name]
    rows, columns = gpu_tile_shape(device.memory_bytes)
    lines = [
        f"PREDICTIONS for {device.name}, not measurements: bfloat16, tiles of {rows} x {columns}, products at "
        f"{PRODUCT_SHARE:.0%} of {device.peak / 1e12:.0f} TFLOP/s,",
        f"memory {device.memory / 1e12:.2f} TB/s, {GAP * 1e6:.0f} us between calls.",
        "",
        "| N | H | V | head | forward | forward + backward | / bare products | of it epilogues |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n, h, v in PUBLISHED:
        product = seconds(Step(1, 2 * n * v * h), device)
        for mode in MODES:
            forward, backward = predict(n, h, v, mode, device)
            passes = linear_logprobs(n, h, v, (rows, columns), mode)
            epilogues = sum(seconds(s, device) for steps in passes for s in steps.values() if not s.flop)
            count = sum(bool(step.flop) for steps in passes for step in steps.values())
            lines.append(
                f"| {n} | {h} | {v} | {mode} | {forward * 1e3:.1f} ms | {(forward + backward) * 1e3:.1f} ms | "
                f"{(forward + backward) / (count * product):.2f} x {count} | {epilogues * 1e3:.1f} ms |"
            )
    lines += ["", "Published for an H100, forward and backward:"]
    lines += [f"- N={n}, H={h}, V={v}: {ms} ms ({whose})" for (n, h, v), (ms, whose) in PUBLISHED.items()]
    lines.append("The share of the peak is what the second of them comes to for three products.")
    return "\n".join(lines)
