"""Plots from records alone: memory against the vocabulary size, curves of cost, and the roofline."""

from __future__ import annotations

import io
import math
import statistics
from collections import defaultdict

from bench.harness.measure import FLOOR, Measurement

OURS = ("fastalign cpu", "fastalign torch", "fastalign triton", "fastalign cuda")
PRODUCTS = {"forward": 1, "frozen": 2, "trainable": 3}


def all_of(measurements: list[Measurement]) -> dict[str, bytes]:
    """Name -> PNG of every plot for which there are enough records."""
    plots = {f"memory-{kind}": memory(kind, lines) for kind, lines in _by_vocabulary(measurements).items()}
    curves = _curves(measurements)
    if curves:
        plots["curves"] = scale(curves)
    fastest_last = sorted(measurements, key=lambda m: m.median_s, reverse=True)
    machine = {m.case: m for m in fastest_last if m.suite == "machine"}
    if "copy" in machine:
        points = _roofline_points([m for m in measurements if m.threads == machine["copy"].threads])
        if points:
            plots["roofline"] = roofline(points, machine)
    return plots


def _by_vocabulary(measurements: list[Measurement]) -> dict[str, dict[str, dict[int, int]]]:
    """Kind of case -> implementation -> V -> peak extra bytes, for kinds with two or more vocabulary sizes."""
    groups: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for m in measurements:
        if m.peak_extra_bytes is not None and "v" in m.sizes:
            kind = m.case.replace(f"x{m.sizes['v']}", "")
            groups[kind][m.implementation][m.sizes["v"]] = m.peak_extra_bytes
    return {kind: lines for kind, lines in groups.items() if len({v for line in lines.values() for v in line}) > 1}


def memory(kind: str, lines: dict[str, dict[int, int]]) -> bytes:
    """Plots peak extra memory against V, with one line per implementation."""
    figure, axes = _figure()
    for implementation, points in lines.items():
        vocabularies = sorted(points)
        style = {"marker": "o", "lw": 2.4 if implementation in OURS else 1.2}
        style |= {"linestyle": ":", "color": "grey"} if FLOOR in implementation else {}
        axes.plot(vocabularies, [points[v] / 2**20 for v in vocabularies], label=implementation, **style)
    axes.set(xlabel="vocabulary V", ylabel="extra memory, MiB", title=f"memory of one call ({kind})")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    return _png(figure)


def _curves(measurements: list[Measurement]) -> dict[str, list[Measurement]]:
    curves = defaultdict(list)
    for m in measurements:
        if m.suite == "scale":
            curves[m.case].append(m)
    return dict(curves)


def slope(points: list[int], seconds: list[float]) -> float:
    """The exponent b of `seconds = a points^b`: least squares on the logarithms, without points at 0."""
    pairs = [(math.log(p), math.log(s)) for p, s in zip(points, seconds, strict=True) if p > 0]
    return statistics.linear_regression(*zip(*pairs, strict=True)).slope


def slope_of(rows: list[Measurement]) -> float:
    """The exponent with which the time of a curve grows."""
    return slope([next(iter(m.sizes.values())) for m in rows], [m.median_s for m in rows])


def scale(curves: dict[str, list[Measurement]]) -> bytes:
    """Plots time against each axis on logarithmic scales. The legend shows the fitted exponent of each curve."""
    from matplotlib.figure import Figure

    names = sorted({next(iter(rows[0].sizes)) for rows in curves.values()})
    figure = Figure(figsize=(3.6 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for rows in curves.values():
            if next(iter(rows[0].sizes)) != name:
                continue
            label = f"{rows[0].threads} thread{'s' if rows[0].threads > 1 else ''}: power {slope_of(rows):.2f}"
            axes.plot([m.sizes[name] for m in rows], [m.median_s for m in rows], marker="o", label=label)
        if name != "prompt":  # a share that begins at 0 %, which has no logarithm
            axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel={"prompt": "share of prompt, %"}.get(name, name.upper() if len(name) == 1 else name))
        axes.set_ylabel("seconds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=False)
    return _png(figure)


def _roofline_points(measurements: list[Measurement]) -> list[tuple[str, str, float, float]]:
    """(implementation, dtype, FLOP per byte, FLOP per second) of each record of `ops`.

    The bytes are the least that must move: each operand is read once and each result is written once.
    """
    points = []
    for m in measurements:
        if m.suite != "ops" or FLOOR in m.implementation or "mask" not in m.sizes:
            continue
        kind, dtype = m.case.split("-")[:2]
        size = 2 if dtype == "bfloat16" else 4
        rows, h, v = m.sizes["n"] * (100 - m.sizes["mask"]) // 100, m.sizes["h"], m.sizes["v"]
        flop = PRODUCTS[kind] * 2 * rows * h * v
        moved = size * h * (v * (1 + (kind == "trainable")) + rows * (1 if kind == "forward" else 2))
        points.append((m.implementation, dtype, flop / moved, flop / m.median_s))
    return points


def roofline(points: list[tuple[str, str, float, float]], machine: dict[str, Measurement]) -> bytes:
    """Plots FLOP per second against FLOP per byte, below the limits of copy bandwidth and of bare products."""
    figure, axes = _figure()
    copy = machine["copy"]
    bandwidth = copy.sizes["bytes"] / copy.median_s
    rates = {
        case.removeprefix("product-"): m.sizes["flop"] / m.median_s
        for case, m in machine.items()
        if case.startswith("product-")
    }
    largest = 2 * max(x for _, _, x, _ in points)
    for dtype, rate in rates.items():
        knee = rate / bandwidth
        style = {"color": "grey", "linestyle": "-" if dtype == "float32" else ":"}
        axes.plot([knee / 8, knee, largest], [rate / 8 / 1e9, rate / 1e9, rate / 1e9], **style)
        axes.text(largest, rate / 1e9, f"product, {dtype} ", ha="right", va="bottom", fontsize="small", color="grey")
    for implementation in sorted({p[0] for p in points}, key=lambda name: (name not in OURS, name)):
        own = [p for p in points if p[0] == implementation]
        marker = {"marker": "o" if implementation in OURS else ".", "zorder": 3 if implementation in OURS else 2}
        axes.scatter([p[2] for p in own], [p[3] / 1e9 for p in own], label=implementation, **marker)
    axes.set(xlabel="FLOP per byte that must move", ylabel="GFLOP/s", title="roofline, linear_logprobs")
    axes.set_xscale("log")
    axes.set_yscale("log")
    return _png(figure)


def _figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure) -> bytes:
    if len(figure.axes) == 1:
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()
