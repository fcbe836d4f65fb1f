"""Training curves as small SVG charts, to be put into a page that sets their colours.

    metric records -> Curve (steps, values, running mean) -> SVG whose colours are CSS variables -> Drawing

matplotlib draws with placeholder colours, which are then replaced by CSS variables: one drawing serves light and dark
pages. No text of a run's files enters an SVG. Titles, names and numbers are part of the page, which escapes them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["CHARTS", "COLOURS", "Chart", "Drawing", "draw", "draw_svg"]

MANY_POINTS = 60  # from this many on, raw values are drawn thin and their running mean thick
DRAWN_POINTS = 600  # per line; about two per pixel
LARGEST = 1e300  # with larger values matplotlib's axis limits overflow

COLOURS = {"--ink": "#010203", "--muted": "#010204", "--grid": "#010205", "--first": "#010206", "--second": "#010207"}
PAPER = "#010208"

STYLE = {
    "axes.edgecolor": COLOURS["--muted"],
    "axes.labelcolor": COLOURS["--muted"],
    "axes.facecolor": "none",
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.color": COLOURS["--grid"],
    "grid.linewidth": 0.6,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": COLOURS["--muted"],
    "ytick.color": COLOURS["--muted"],
}


@dataclass(frozen=True)
class Chart:
    """What one chart shows: up to two metrics, each with its value on the evaluation set (`eval_` + key)."""

    title: str
    unit: str  # of the y axis
    keys: dict[str, str]  # metric -> its name in the legend, e.g. {"rewards/chosen": "chosen"}
    percent: bool = False  # values are fractions, shown as 0 to 100 %
    from_zero: bool = False
    noisy: bool = True  # many points get a running mean


CHARTS = (
    Chart("Loss", "loss", {"loss": "train"}),
    Chart("Reward margin", "chosen \N{MINUS SIGN} rejected", {"rewards/margins": "train"}),
    Chart("Preference accuracy", "% of pairs", {"rewards/accuracies": "train"}, percent=True),
    Chart("Preference accuracy by log-prob per token", "% of pairs", {"logps/accuracies": "train"}, percent=True),
    Chart("Rewards", "reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Chart("Log-probabilities", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    Chart("Negative log-likelihood", "nats per token", {"nll_loss": "train"}),
    Chart("KL to the start", "nats", {"kl": "train"}),
    Chart("Completion length", "tokens", {"lengths/chosen": "chosen", "lengths/rejected": "rejected"}, from_zero=True),
    Chart("Learning rate", "learning rate", {"learning_rate": "train"}, from_zero=True, noisy=False),
    Chart("Gradient norm", "norm", {"grad_norm": "train"}, from_zero=True),
    Chart("Speed", "tokens/s", {"tokens_per_second": "train"}, from_zero=True),
    Chart("Memory", "GB", {"memory_gb": "train"}, from_zero=True, noisy=False),
)


@dataclass(frozen=True)
class Curve:
    """One metric over the steps."""

    name: str
    colour: str  # a CSS variable
    evaluation: bool
    steps: np.ndarray  # (n,) float64, increasing
    values: np.ndarray  # (n,) float64, NaN where the logged value was not finite
    thick: np.ndarray  # (n,) float64, the running mean of many noisy values, otherwise the values themselves

    @property
    def ends(self) -> tuple[float, float] | None:
        """First and last value of the thick line; None if no value is finite."""
        finite = self.thick[np.isfinite(self.values)]
        return (float(finite[0]), float(finite[-1])) if len(finite) else None

    @property
    def bad_steps(self) -> list[int]:
        """Steps whose value was not finite."""
        return [int(step) for step in self.steps[~np.isfinite(self.values)]]


@dataclass(frozen=True)
class Drawing:
    """A chart with its curves. `svg` is empty if none of its values is finite."""

    chart: Chart
    curves: list[Curve]
    svg: str

    @property
    def smoothed(self) -> bool:
        """Whether a curve shows a running mean beside its raw values."""
        return any(curve.thick is not curve.values for curve in self.curves)


def draw(chart: Chart, records: list[dict[str, Any]]) -> Drawing | None:
    """Draw a chart.

    Args:
        chart: what to show.
        records: the records of metrics.jsonl. If a step was logged twice, as after resuming from a checkpoint, the
            later record counts.

    Returns:
        The drawing; None if none of the chart's metrics was logged.
    """
    curves = []
    for (key, name), colour in zip(chart.keys.items(), ("--first", "--second"), strict=False):
        evaluation_name = "evaluation" if name == "train" else f"{name}, evaluation"
        curves.append(_curve(chart, records, key, name, colour))
        curves.append(_curve(chart, records, f"eval_{key}", evaluation_name, colour, evaluation=True))
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return None
    steps = [step for record in records if math.isfinite(step := _as_float(record.get("step")))]
    span = min(steps), max(steps)  # of the whole run, so that all charts have the same x axis
    return Drawing(chart, curves, _svg(chart, curves, span) if any(curve.ends for curve in curves) else "")


def _curve(chart: Chart, records, key: str, name: str, colour: str, evaluation: bool = False) -> Curve:
    steps, values = series(records, key)
    if chart.percent:
        values = 100 * values
    smooth = chart.noisy and not evaluation and len(values) >= MANY_POINTS
    return Curve(name, colour, evaluation, steps, values, running_mean(values) if smooth else values)


def series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (both float64) of one metric, sorted by step. A value that is not a finite number is NaN."""
    by_step = {}
    for record in records:
        step, value = _as_float(record.get("step")), record.get(key)
        if step == step and isinstance(value, int | float):
            by_step[step] = _as_float(value)
    steps = np.array(sorted(by_step), dtype=np.float64)
    return steps, np.array([by_step[step] for step in steps], dtype=np.float64)


def _as_float(value: Any) -> float:
    """The value as a float; NaN if it is not a number, or too large to draw."""
    if not isinstance(value, int | float) or not abs(value) < LARGEST:
        return float("nan")
    return float(value)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Running mean over a centred window of a 20th of all points, taken twice. NaNs are left out of it, and stay NaN.

    Twice, because one mean over a flat window still shows every step at which an outlier enters or leaves the window.
    """
    half = max(2, len(values) // 40)
    finite = np.isfinite(values)
    smooth = values
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(np.where(finite, smooth, 0.0))])
        counts = np.concatenate([[0], np.cumsum(finite)])
        start = np.maximum(np.arange(len(values)) - half, 0)
        stop = np.minimum(np.arange(len(values)) + half + 1, len(values))
        smooth = np.where(finite, (sums[stop] - sums[start]) / np.maximum(counts[stop] - counts[start], 1), np.nan)
    return smooth


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most DRAWN_POINTS points whose line looks the same: lowest and highest value of each stretch, and its gaps."""
    if len(steps) <= DRAWN_POINTS:
        return steps, values
    keep = []
    for stretch in np.array_split(np.arange(len(steps)), DRAWN_POINTS // 3):
        finite = stretch[np.isfinite(values[stretch])]
        if len(finite):
            keep += [finite[values[finite].argmin()], finite[values[finite].argmax()]]
        if len(finite) < len(stretch):
            keep.append(stretch[~np.isfinite(values[stretch])][0])
    keep = np.unique(keep)
    return steps[keep], values[keep]


def _svg(chart: Chart, curves: list[Curve], span: tuple[float, float]) -> str:
    def plot(axes) -> None:
        axes.update_datalim([(step, 0) for step in span], updatey=False)
        _plot(axes, chart, curves)

    return draw_svg(plot, "step", chart.unit, salt=chart.title + "".join(chart.keys))


def draw_svg(plot: Callable[[Axes], None], xlabel: str, ylabel: str, *, salt: str) -> str:
    """An SVG element with one pair of axes.

    Args:
        plot: draws on the axes, in COLOURS.
        xlabel: label of the x axis.
        ylabel: label of the y axis.
        salt: makes the names inside the SVG different from those of other charts on the same page.
    """
    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": salt}
    with mpl.rc_context():
        mpl.rcdefaults()  # a reader's own style must not reach the page
        mpl.rcParams.update(style)
        figure = Figure(figsize=(4.0, 2.5))
        FigureCanvasSVG(figure)
        plot(figure.add_axes((0.175, 0.18, 0.815, 0.74), xlabel=xlabel, ylabel=ylabel))
        page = io.StringIO()
        figure.savefig(page, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(page.getvalue())


def _plot(axes, chart: Chart, curves: list[Curve]) -> None:
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if chart.percent:
        axes.set_ylim(-3, 103)
        axes.axhline(50, color=COLOURS["--muted"], linewidth=0.8, linestyle=(0, (2, 2)))
    for curve in curves:
        colour = COLOURS[curve.colour]
        if curve.evaluation:
            marks = {"marker": "o", "markersize": 4.5, "markerfacecolor": PAPER, "markeredgewidth": 1.4}
            axes.plot(*thin(curve.steps, curve.values), "--", color=colour, linewidth=1.1, zorder=4, **marks)
            continue
        if curve.thick is not curve.values:
            axes.plot(*thin(curve.steps, curve.values), color=colour, linewidth=0.7, alpha=0.35, zorder=2)
        lone = np.isfinite(curve.values).sum() == 1
        axes.plot(*thin(curve.steps, curve.thick), color=colour, linewidth=1.8, marker="o" if lone else "", zorder=3)
    drawn = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in curves])
    if chart.from_zero and drawn.min() >= 0 and drawn.max() > 0:
        axes.set_ylim(0, 1.06 * drawn.max())


def _inline(svg: str) -> str:
    """The SVG element alone, coloured by CSS variables: no prologue, style sheet, fixed size, or names of groups."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'^<svg[^>]*(viewBox="[-\d. ]+")[^>]*>', r'<svg \1 aria-hidden="true">', svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    for variable, placeholder in (*COLOURS.items(), ("--paper", PAPER)):
        svg = svg.replace(placeholder, f"var({variable})")
    return re.sub(r"\s+", " ", svg).replace("> <", "><").strip()
