"""Tables from records alone. Nothing here measures, and nothing that measures imports this module.

There is one Markdown table per case, with aligned columns, so that it reads the same on a terminal and in a file. Its
columns depend on the suite:

- `train`: pairs and tokens per second
- `scale`: one line per point of the curve
- memory-bound ops (a gather): bytes per second beside the copy rate
- everything else: time beside that of the bare matrix products (the floor)
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from bench.harness.measure import FLOOR, Measurement
from bench.pages import plots
from bench.pages.page import page
from fastalign.files import atomic_write

HEADER = ("implementation", "time", "quartiles", "time / floor", "extra memory", "max error against float64")
TRAIN_HEADER = (
    "implementation", "pairs/s", "useful tokens/s", "of the GEMM rate", "a step", "its reference", "peak memory",
    "loss differs by",
)  # fmt: skip
GATHER_HEADER = (
    "implementation", "time", "quartiles", "GB/s that must move", "of the copy rate", "extra memory", "max error",
)  # fmt: skip
SCALE_HEADER = ("", "time", "quartiles", "max error")


def groups(measurements: list[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """The records of each (suite, case), in the order they were measured."""
    cases = defaultdict(list)
    for measurement in measurements:
        cases[measurement.suite, measurement.case].append(measurement)
    return dict(cases)


def tables(measurements: list[Measurement]) -> str:
    """The tables of all cases, one after another, in Markdown."""
    parts = []
    for (suite, case), rows in groups(measurements).items():
        parts.append(f"### {suite}: {case}\n\n{aligned(table(rows))}\n\n{about(rows)}")
    return "\n\n".join(parts) + "\n"


def table(rows: list[Measurement]) -> list[tuple[str, ...]]:
    """Header and rows of one case. The fastest comes first, but a curve keeps the order of its points."""
    if rows[0].suite == "train":
        return [TRAIN_HEADER, *(_train_row(m) for m in sorted(rows, key=lambda m: m.median_s))]
    if rows[0].suite == "scale":
        return [SCALE_HEADER, *(_scale_row(m) for m in rows)]
    if "copy_bytes_per_s" in rows[0].sizes:
        return [GATHER_HEADER, *(_gather_row(m) for m in sorted(rows, key=lambda m: m.median_s))]
    floor = min((m.median_s for m in rows if FLOOR in m.implementation), default=None)
    return [HEADER, *(_row(m, floor) for m in sorted(rows, key=lambda m: m.median_s))]


def about(rows: list[Measurement]) -> str:
    """Says how, where and when the case was measured, and which implementations were not measured and why."""
    first = rows[0]
    skipped = "".join(f" Not measured: {name}: {reason.rstrip('.')}." for name, reason in first.skipped.items())
    versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    fit = f" Time grows with the power {plots.slope_of(rows):.2f}." if first.suite == "scale" else ""
    return (
        f"Median of {first.runs} interleaved runs; checked: {first.checked}.{fit} {first.device}, {first.threads} "
        f"thread{'s' if first.threads > 1 else ''}, load {first.load} before. {versions}; commit {first.commit}, "
        f"{first.date}.{skipped}{_curves(rows)}"
    )


def _curves(rows: list[Measurement]) -> str:
    """The loss of each training step, if the records have losses."""
    curves = [f"{m.implementation} {' '.join(f'{loss:.5f}' for loss in m.losses)}" for m in rows if m.losses]
    return f" Losses: {'; '.join(curves)}." if curves else ""


def _row(m: Measurement, floor: float | None) -> tuple[str, ...]:
    return *_times(m), "-" if floor is None else f"{m.median_s / floor:.2f}", _memory(m), _errors(m)


def _gather_row(m: Measurement) -> tuple[str, ...]:
    rate = m.sizes["bytes"] / m.median_s
    return *_times(m), f"{rate / 1e9:,.1f}", f"{rate / m.sizes['copy_bytes_per_s']:.0%}", _memory(m), _errors(m)


def _times(m: Measurement) -> tuple[str, ...]:
    return m.implementation, seconds(m.median_s), f"{seconds(m.q1_s)} - {seconds(m.q3_s)}"


def _memory(m: Measurement) -> str:
    return "-" if m.peak_extra_bytes is None else f"{m.peak_extra_bytes / 2**20:,.0f} MiB"


def _errors(m: Measurement) -> str:
    return ", ".join(f"{output} {error:.1e}" for output, error in m.errors.items())


def _train_row(m: Measurement) -> tuple[str, ...]:
    share = m.sizes["flop"] / m.median_s / m.sizes["gemm_flop_per_s"]
    reference = m.sizes["reference_us"] / 1e6
    return (
        m.implementation,
        f"{m.sizes['pairs'] / m.median_s:.3f}",
        f"{m.sizes['tokens'] / m.median_s:,.0f}",
        f"{share:.0%}",
        seconds(m.median_s),
        f"{seconds(reference)} of it" if reference else "within",
        f"{m.sizes['resident_bytes'] / 2**30:.2f} GiB",
        f"{m.errors['loss']:.1e}",
    )


def _scale_row(m: Measurement) -> tuple[str, ...]:
    return *_times(m), _errors(m)


def seconds(value: float) -> str:
    """A time as text: seconds from 1 s on, else milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def aligned(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table with aligned columns. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write(files: dict[str, bytes], folder: Path) -> list[Path]:
    """Writes each file atomically, and returns the paths."""
    for name, content in files.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
    return [folder / name for name in files]


def everything(measurements: list[Measurement], folder: Path) -> list[Path]:
    """Writes `report.html` with all tables and plots, and the plots as PNG files beside it. Returns the paths."""
    figures = plots.all_of(measurements)
    cases = [(f"{suite}: {case}", table(rows), about(rows)) for (suite, case), rows in groups(measurements).items()]
    files = {f"{name}.png": png for name, png in figures.items()}
    return write(files | {"report.html": page("fastalign, measured", cases, figures).encode()}, folder)
