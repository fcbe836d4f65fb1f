"""Predicts the time of the tiled kernels on a GPU from the FLOP they compute and the bytes they move.

The counts are exact: tests/bench/harness/test_model.py compares them with the calls, FLOP and bytes of the driver, and
tests/cuda/test_launches.py counts the launches of every op. The time of a step is the larger of two: its FLOP at the
rate of a good matrix product, or its operands and tiles at the rate of the memory. Steps run one after another. What
was measured on a GPU is in docs/explanation/gpu.md.
"""

from __future__ import annotations

from typing import NamedTuple

from fastalign.ops.head.anchored import block_rows, part_columns
from fastalign.ops.head.tiling import gpu_tile_shape

MODES = ("frozen", "cached", "recomputed")


class Step(NamedTuple):
    """All calls of one kind in one pass.

    Attributes:
        calls: number of calls.
        flop: floating-point operations of all calls.
        operands: bytes of hidden, weight, accumulators and kept probabilities. Each counts as often as it is read.
        tiles: bytes of tiles that a product or an epilogue has just written.
    """

    calls: int
    flop: int = 0
    operands: int = 0
    tiles: int = 0


def linear_logprobs(
    n: int, h: int, v: int, tile: tuple[int, int], mode: str, element: int = 2
) -> tuple[dict[str, Step], dict[str, Step]]:
    """Steps of the forward and the backward pass of `linear_logprobs`, without an entropy.

    Args:
        n: rows, a multiple of 16.
        h: width of the hidden states.
        v: vocabulary entries.
        tile: rows and vocabulary entries of one tile.
        mode: "frozen": the forward pass keeps d logprob / d hidden. "cached" and "recomputed": the head is trainable,
            and the forward pass keeps all probabilities for the backward pass, or none of them.
        element: bytes per number.

    Returns:
        (forward, backward), each name -> step.
    """
    rows, columns = -(-n // tile[0]), -(-v // tile[1])
    calls, u = rows * columns, 2 * n * v * h
    hidden, weight = n * h * element * columns, v * h * element * rows
    sums, gradient = 2 * 4 * n * h * columns, 2 * 4 * v * h * rows  # read and written once per tile, in float32
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


def anchored_logprobs(n: int, h: int, v: int, mode: str, element: int = 2) -> tuple[dict[str, Step], dict[str, Step]]:
    """Steps of the forward and the backward pass of the anchored driver, without an entropy; names as in its head.

    Args:
        n: rows. A frozen head takes them in blocks of `block_rows(v)`.
        h: width of the hidden states.
        v: vocabulary entries.
        mode: as for `linear_logprobs`.
        element: bytes per number of the inputs. Exponentials have 2.

    Returns:
        (forward, backward), each name -> step.
    """
    blocks = -(-n // block_rows(v)) if mode == "frozen" else 1
    u, hidden, weight, e = 2 * n * v * h, n * h * element, v * h * element, 2 * n * v
    partial = 4 * n * -(-v // 256)
    ends = {"anchor": Step(blocks, 0, 2 * hidden), "rescue": Step(blocks, 0, partial)}
    finish = Step(blocks, 0, partial + (hidden + 2 * 4 * n * h if mode == "frozen" else 0))
    scan = Step(blocks, u, hidden + blocks * weight, partial + (0 if mode == "recomputed" else e))
    if mode == "frozen":  # e is written once and read once
        return {**ends, "scan": scan, "product": Step(blocks, u, blocks * weight + 4 * n * h, e), "finish": finish}, {}
    parts = 1 if mode == "cached" else -(-v // part_columns(n, 0))
    both = {
        "hidden": Step(parts, u, weight + 4 * n * h * (2 * parts - 1), e),
        "weight": Step(parts, u, hidden * parts + weight, e),
    }
    if mode == "cached":  # e is read twice; the coefficients go into the hidden states
        return {**ends, "scan": scan, "finish": finish}, {"scaled": Step(1, 0, 2 * hidden)} | both
    again = {"scan": Step(parts, u, hidden * parts + weight, e)}
    return {**ends, "scan": scan, "finish": finish}, again | both


def linear_divergence(
    n: int, h: int, g: int, v: int, tile: tuple[int, int], kind: str, element: int = 2
) -> dict[str, Step]:
    """Steps of the forward pass of `linear_divergence` with a frozen student head.

    The logits of student and teacher of a whole block of rows are held, so they do not fit the cache.

    Args:
        n: rows.
        h: width of the student.
        g: width of the teacher.
        v: vocabulary entries.
        tile: rows of one block, vocabulary entries of one tile.
        kind: the divergence.
        element: bytes per number.
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
    """(forward, backward): forward reads the logits once, backward reads them once and writes their gradient."""
    return Step(1, 0, n * v * element), Step(1, 0, 2 * n * v * element)


def preference_loss(tokens: int) -> tuple[Step, Step]:
    """(forward, backward): forward reads log-probs and writes coefficients, backward reads those, writes gradients."""
    return Step(1, 0, 2 * 4 * tokens), Step(1, 0, 2 * 4 * tokens)


def accumulate_fisher(tokens: int, out: int, width: int, tile: tuple[int, int] = (128, 64), element: int = 2) -> Step:
    """One step: F is read and written once, and each operand is read once per row or column of tiles of F."""
    operands = tokens * (out * -(-width // tile[1]) + width * -(-out // tile[0])) * element
    return Step(1, 2 * tokens * out * width, operands + 2 * 4 * out * width)


class Device(NamedTuple):
    """Figures from the data sheet of a GPU."""

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
# The share of its peak that a large product reaches. It follows from the published 42 ms for three products on an H100.
PRODUCT_SHARE = 0.74
# Assumed seconds between two kernels: the end of one and the start of the next.
GAP = 3e-6
# (N, H, V) -> milliseconds that others published for an H100, forward and backward, and what they measured.
PUBLISHED = {
    (16384, 4096, 131072): (104.8, "Liger, its SM90 kernel"),
    (8192, 4096, 151936): (42.0, "TRL, the products of the head alone"),
}


# (N, H, V) -> milliseconds of the tiled driver on an H200, forward and backward, frozen and trainable, host included
# (docs/explanation/gpu.md). Then those of two and of three bare products there.
MEASURED = {
    (2048, 576, 49152): (1.83, 4.13, 0.448, 0.53),
    (2048, 2048, 49152): (2.15, 5.07, 1.22, 1.67),
    (1024, 4096, 128256): (3.85, 9.49, 2.99, 4.35),
}


def seconds(step: Step, device: Device) -> float:
    """The predicted seconds of a step, including the gaps between its calls."""
    rate = device.peak * PRODUCT_SHARE
    return max(step.flop / rate, (step.operands + step.tiles) / device.memory) + step.calls * GAP


def predict(n: int, h: int, v: int, mode: str, device: Device) -> tuple[float, float]:
    """The predicted seconds of (forward, backward)."""
    passes = linear_logprobs(n, h, v, gpu_tile_shape(device.memory_bytes), mode)
    return tuple(sum(seconds(step, device) for step in steps.values()) for steps in passes)


def anchored_table(device: Device) -> list[str]:
    """The predictions for the anchored driver as lines, beside what was measured of the tiled one."""
    lines = [
        "PREDICTIONS for the anchored driver (bfloat16, compute capability 9.0 on), which has not run on a GPU yet.",
        "Beside them: what the tiled driver took on an H200, and bare products there; forward and backward.",
        "",
        "| N | H | V | head | predicted | exponentials moved | tiled, measured | bare products, measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (n, h, v), measured in MEASURED.items():
        for i, (head, mode) in enumerate((("frozen, 2U", "frozen"), ("trainable, 3U", "cached"))):
            steps = [step for steps in anchored_logprobs(n, h, v, mode) for step in steps.values()]
            total, moved = sum(seconds(step, device) for step in steps) * 1e3, sum(step.tiles for step in steps)
            lines.append(
                f"| {n} | {h} | {v} | {head} | {total:.2f} ms | {moved >> 20} MiB | {measured[i]} ms | "
                f"{measured[2 + i]} ms |"
            )
    return [*lines, ""]


def table(name: str) -> str:
    """The predictions for one device as text, beside what others published."""
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
    lines += ["", *(anchored_table(device) if device.peak > 900e12 else [])]
    lines += ["Published for an H100, forward and backward:"]
    lines += [f"- N={n}, H={h}, V={v}: {ms} ms ({whose})" for (n, h, v), (ms, whose) in PUBLISHED.items()]
    lines.append("The share of the peak is what the second of them comes to for three products.")
    return "\n".join(lines)
