"""README's table and plot of results, between two markers, from measurements alone."""

from __future__ import annotations

import os
import sys

from bench import plots
from bench.measure import FLOOR, ROOT, Measurement
from bench.report import aligned, groups, seconds

BEGIN, END = "<!-- results: python -m bench report -->", "<!-- end of results -->"
README = ROOT / "README.md"
# (case of `ops`, what to call it)
OPS = (
    ("frozen-float32-2048x576x49152-mask0", "log-probs and gradient, frozen head"),
    ("frozen-float32-2048x576x49152-mask50", "the same, half of the tokens prompt"),
)
PEERS = {  # column -> what names it among the implementations
    "TRL": "TRL", "Liger": "Liger", "Cut Cross Entropy": "Cut Cross Entropy", "torch": "torch linear_cross_entropy",
}  # fmt: skip
TRAIN = (
    ("lora-float32-dialogue", "LoRA float32, dialogue"),
    ("lora-bfloat16-dialogue", "LoRA bfloat16, dialogue"),
    ("lora-float32-long", "LoRA float32, long prompts"),
    ("full-float32-dialogue", "all weights, dialogue"),
)
PLOT = "memory-frozen-float32-2048x576-mask0"


def update(measurements: list[Measurement]) -> None:
    """Rewrites what stands between the markers, atomically; without them, or any of its cases, it ends with a word."""
    text = README.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        sys.exit(f"{README} must hold {BEGIN!r} and then {END!r}, once each; what is between them is written here")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    table = section(measurements)
    temporary = README.with_suffix(".tmp")
    temporary.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    os.replace(temporary, README)


def section(measurements: list[Measurement]) -> str:
    """The tables, what they were measured on, and the plot."""
    cases = groups(measurements)
    op_rows = [("`linear_logprobs`, time (extra memory)", "fastalign", *PEERS, "bare products")]
    op_rows += [_op_row(cases["ops", case], name) for case, name in OPS if ("ops", case) in cases]
    train_rows = [("DPO steps, pairs/s (peak memory)", "fastalign", "TRL", "ratio")]
    train_rows += [row for case, name in TRAIN if (row := _train_row(cases.get(("train", case), []), name))]
    parts = [aligned(rows) for rows in (train_rows, op_rows) if len(rows) > 1]
    used = [rows[0] for (_, case), rows in cases.items() if case in dict((*OPS, *TRAIN))]
    if not used:
        sys.exit("the results hold none of the cases of README's table: " + ", ".join(dict((*OPS, *TRAIN))))
    newest = max(used, key=lambda m: m.date)
    versions = ", ".join(f"{n} {v}" for n, v in newest.versions.items() if n in ("torch", "trl", "liger-kernel"))
    parts.append(
        f"Steps are of SmolLM2-135M-Instruct, single calls of random values in its shapes. {newest.device}, "
        f"{newest.threads} threads;\n{versions}; {newest.date[:10]}.\n"
        "Of TRL's two settings (activations kept, or recomputed), where both were run, each figure is the better one:\n"
        "the pairs/s of the faster, the memory of the leaner.\n"
        "More, with errors against float64, in [bench/results](bench/results)."
    )
    if any("bfloat16" in row[0] for row in train_rows) and newest.device.endswith("AVX2"):
        parts[-1] += (
            "\nThis CPU has no bfloat16 instructions: TRL's products take minutes there, fastalign widens to float32."
        )
    if any("-" in row for row in op_rows):
        parts[-1] += "\n-: not measured." + "".join(
            _skipped(cases["ops", case][0], name) for case, name in OPS if ("ops", case) in cases
        )
    if PLOT in plots.all_of(measurements):
        parts.append(f"![Memory against vocabulary](bench/results/{PLOT}.png)")
    return "\n\n".join(parts)


def _skipped(first: Measurement, row: str) -> str:
    """Why some cells of a row are empty, where its records say so."""
    reasons = [
        f"{column}: {reason.rstrip('.')}"
        for column, word in PEERS.items()
        for name, reason in first.skipped.items()
        if word in name
    ]
    return f" {row[0].upper()}{row[1:]}: {'; '.join(reasons)}." if reasons else ""


def _op_row(rows: list[Measurement], name: str) -> tuple[str, ...]:
    def cell(*wanted: str) -> str:
        found = [m for m in rows for w in wanted if w in m.implementation]
        if not found:
            return "-"
        best = min(found, key=lambda m: m.median_s)
        memory = "" if best.peak_extra_bytes is None else f" ({best.peak_extra_bytes / 2**20:,.0f} MiB)"
        return seconds(best.median_s) + memory

    return name, cell("fastalign cpu"), *map(cell, PEERS.values()), cell(FLOOR)


def _train_row(rows: list[Measurement], name: str) -> tuple[str, ...] | None:
    """None unless both trainers were measured."""
    ours = next((m for m in rows if m.implementation == "fastalign"), None)
    theirs = [m for m in rows if m.implementation.startswith("TRL")]
    if ours is None or not theirs:
        return None

    def cell(pairs: float, resident: int) -> str:
        return f"{pairs:.2f} ({resident / 2**30:.1f} GiB)"

    fastest = min(theirs, key=lambda m: m.median_s)
    leanest = min(m.sizes["resident_bytes"] for m in theirs)
    pairs = ours.sizes["pairs"]
    return (
        name,
        cell(pairs / ours.median_s, ours.sizes["resident_bytes"]),
        cell(pairs / fastest.median_s, leanest),
        f"{fastest.median_s / ours.median_s:.1f}x",
    )
