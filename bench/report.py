"""Tables and plots from measurements alone: nothing here runs anything, and nothing that runs knows of it."""

from __future__ import annotations

import io
import os
from collections import defaultdict
from pathlib import Path

from bench.measure import FLOOR, Measurement

HEADER = ("implementation", "time", "quartiles", "time / floor", "extra memory", "max error against float64")


def tables(measurements: list[Measurement]) -> str:
    """One table per case, fastest first, in Markdown with its columns aligned: the same on a terminal and in a file."""
    cases = defaultdict(list)
    for measurement in measurements:
        cases[measurement.suite, measurement.case].append(measurement)
    return "\n\n".join(_case(rows) for rows in cases.values()) + "\n"


def _case(rows: list[Measurement]) -> str:
    first = rows[0]
    floor = min((m.median_s for m in rows if FLOOR in m.implementation), default=None)
    body = [_row(m, floor) for m in sorted(rows, key=lambda m: m.median_s)]
    versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    return (
        f"### {first.suite}: {first.case}\n\n{_aligned([HEADER, *body])}\n\n"
        f"Median of {first.runs} interleaved runs; checked: {first.checked}. {first.device}, {first.threads} threads, "
        f"load {first.load} before. {versions}; commit {first.commit}, {first.date}."
    )


def _row(m: Measurement, floor: float | None) -> tuple[str, ...]:
    errors = ", ".join(f"{output} {error:.1e}" for output, error in m.errors.items())
    return (
        m.implementation,
        seconds(m.median_s),
        f"{seconds(m.q1_s)} - {seconds(m.q3_s)}",
        "-" if floor is None else f"{m.median_s / floor:.2f}",
        "-" if m.peak_extra_bytes is None else f"{m.peak_extra_bytes / 2**20:,.0f} MiB",
        errors,
    )


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def memory_plots(measurements: list[Measurement]) -> dict[str, bytes]:
    """File name -> PNG of peak extra memory against V, for every kind of case measured at two vocabularies or more."""
    groups: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for m in measurements:
        if m.peak_extra_bytes is not None and "v" in m.sizes:
            kind = m.case.replace(f"x{m.sizes['v']}", "")
            groups[kind][m.implementation][m.sizes["v"]] = m.peak_extra_bytes
    several = {kind: lines for kind, lines in groups.items() if len({v for line in lines.values() for v in line}) > 1}
    return {f"memory-{kind}.png": _memory_plot(kind, lines) for kind, lines in several.items()}


def _memory_plot(kind: str, lines: dict[str, dict[int, int]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for implementation, points in lines.items():
        vocabularies = sorted(points)
        style = {"linestyle": ":", "color": "grey"} if FLOOR in implementation else {"marker": "o"}
        axes.plot(vocabularies, [points[v] / 2**20 for v in vocabularies], label=implementation, **style)
    axes.set(xlabel="vocabulary V", ylabel="extra memory, MiB", title=kind)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def write(measurements: list[Measurement], folder: Path, stem: str) -> list[Path]:
    """Writes `<stem>.md` and the plots into `folder`, atomically; the paths written."""
    files = {f"{stem}.md": tables(measurements).encode()}
    files |= {f"{stem}-{name}": png for name, png in memory_plots(measurements).items()}
    for name, content in files.items():
        temporary = folder / f"{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)
    return [folder / name for name in files]
