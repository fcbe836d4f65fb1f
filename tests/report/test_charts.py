"""Charts: what is drawn is what was logged, and the SVG stays within its place on the page."""

import re

import matplotlib as mpl
import numpy as np
import pytest

from fastalign.report.charts import CHARTS, DRAWN_POINTS, MANY_POINTS, Chart, draw, running_mean, series, thin

LOSS = next(chart for chart in CHARTS if chart.title == "Loss")
ACCURACY = next(chart for chart in CHARTS if chart.title == "Preference accuracy")


def logged(key, values):
    return [{"step": step, key: value} for step, value in enumerate(values)]


def polylines(svg):
    """Coordinates of the paths drawn in a curve's colour."""
    return [
        re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)
        for path, style in re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg)
        if "stroke: var(--first)" in style and "fill: none" in style
    ]


def test_series_is_ordered_by_step_and_the_last_record_of_a_step_counts():
    records = [{"step": 1, "a": 1}, {"step": 3, "a": 3}, {"step": 2, "a": 2}, {"step": 3, "a": 30}, {"step": 4, "b": 4}]
    steps, values = series(records, "a")
    assert steps.tolist() == [1, 2, 3]
    assert values.tolist() == [1, 2, 30]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308, 10**400])
def test_series_marks_what_cannot_be_drawn(value):
    steps, values = series(logged("a", [1.0, value, 2.0]), "a")
    assert steps.tolist() == [0, 1, 2]
    assert np.isnan(values).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "record", [{"a": 1}, {"step": None, "a": 1}, {"step": "x", "a": 1}, {"step": float("nan"), "a": 1}]
)
def test_series_leaves_out_records_without_a_step(record):
    assert series([record], "a")[0].tolist() == []


@pytest.mark.parametrize("value", [None, "0.5", [1], {"x": 1}])
def test_series_leaves_out_what_is_no_number(value):
    assert series([{"step": 1, "a": value}], "a")[0].tolist() == []


def test_running_mean_is_the_mean_of_means_over_finite_neighbours():
    values = np.random.default_rng(0).normal(size=200)
    values[[7, 8, 100]] = np.nan
    half = 200 // 40

    def pass_over(x):
        means = [np.nanmean(x[max(0, i - half) : i + half + 1]) for i in range(len(x))]
        return np.where(np.isnan(values), np.nan, means)

    # Differences of running sums: each within n * eps * sum|x| of the exact sum.
    bound = 2 * len(values) * np.finfo(float).eps * np.nansum(np.abs(values))
    np.testing.assert_allclose(running_mean(values), pass_over(pass_over(values)), rtol=0, atol=bound)


def test_thin_keeps_ends_of_range_and_gaps():
    values = np.random.default_rng(0).normal(size=20_000)
    values[777], values[12_345], values[5_000:5_400] = 99, -99, np.nan
    steps, kept = thin(np.arange(20_000.0), values)
    assert len(kept) <= DRAWN_POINTS
    assert steps[np.nanargmax(kept)] == 777 and steps[np.nanargmin(kept)] == 12_345
    assert np.isnan(kept[(steps >= 5_000) & (steps < 5_400)]).any()
    assert (np.diff(steps) > 0).all()


def test_nothing_is_drawn_of_metrics_that_were_not_logged():
    assert draw(LOSS, logged("eval_rewards/margins", [1, 2])) is None
    assert draw(LOSS, []) is None


def test_train_and_evaluation_share_an_axis():
    records = [{"step": s, "loss": v, "eval_loss": v} for s, v in [(1, 0.7), (2, 0.4), (3, 0.5)]]
    drawing = draw(LOSS, records)
    train, evaluation = polylines(drawing.svg)
    assert len(train) == 3 and train == evaluation
    assert [curve.name for curve in drawing.curves] == ["train", "evaluation"]


def test_charts_of_a_run_share_the_steps_of_the_whole_run():
    records = logged("loss", [0.7, 0.5, 0.4, 0.3, 0.2]) + [{"step": s, "rewards/accuracies": 0.5} for s in (2, 3)]
    (loss,), (accuracy,) = (polylines(draw(chart, records).svg) for chart in (LOSS, ACCURACY))
    assert [x for x, _ in loss[2:4]] == [x for x, _ in accuracy]


def test_few_values_are_drawn_as_they_are_and_many_with_their_mean():
    few = draw(LOSS, logged("loss", np.linspace(1, 0, MANY_POINTS - 1)))
    many = draw(LOSS, logged("loss", np.linspace(1, 0, MANY_POINTS)))
    assert (few.smoothed, len(polylines(few.svg))) == (False, 1)
    assert (many.smoothed, len(polylines(many.svg))) == (True, 2)
    assert "opacity: 0.35" in many.svg


def test_accuracies_are_percent():
    (curve,) = draw(ACCURACY, logged("rewards/accuracies", [0.5, 0.875])).curves
    assert curve.ends == (50.0, 87.5)


def test_a_single_value_is_drawn_as_a_point():
    one, none = draw(LOSS, logged("loss", [0.5])), draw(LOSS, logged("loss", [0.5, 0.4]))
    count = [svg.count("fill: var(--first)") for svg in (one.svg, none.svg)]
    assert count[0] > 0 and count[1] == 0


def test_values_that_are_not_finite_leave_a_gap_and_are_named():
    drawing = draw(LOSS, logged("loss", [1.0, 0.9, float("nan"), 0.7, 0.6]))
    (curve,) = drawing.curves
    assert curve.bad_steps == [2] and curve.ends == (1.0, 0.6)
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--first\)', drawing.svg)
    assert path.count("M") == 2


def test_a_metric_without_one_finite_value_is_named_but_not_drawn():
    drawing = draw(LOSS, logged("loss", [float("nan")] * 3))
    assert drawing.svg == "" and drawing.curves[0].bad_steps == [0, 1, 2] and drawing.curves[0].ends is None


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e299, -1e299], [1e-300, 0.0], [5, 5], [-1, 1]])
@pytest.mark.parametrize("from_zero", [True, False])
def test_extreme_values_are_drawn_without_a_warning(values, from_zero, recwarn):
    assert draw(Chart("x", "y", {"a": "train"}, from_zero=from_zero), logged("a", values)).svg
    assert not recwarn.list


def test_svg_takes_its_colours_from_the_page_and_styles_nothing_else():
    svg = draw(LOSS, logged("loss", [0.7, 0.4])).svg
    assert svg.startswith("<svg ") and svg.endswith("</svg>")
    assert "<style" not in svg and "<metadata" not in svg and "xmlns" not in svg and "font-family" not in svg
    assert not re.search(r":\s*#[0-9a-fA-F]{3,6}\b", svg)
    assert {"var(--first)", "var(--muted)", "var(--grid)"} <= set(re.findall(r"var\(--\w+\)", svg))


def test_a_drawing_depends_on_its_data_alone():
    records = logged("loss", [0.7, 0.4])
    plain = draw(LOSS, records).svg
    with mpl.rc_context({"text.usetex": True, "axes.facecolor": "red", "axes.linewidth": 9, "font.size": 30}):
        assert draw(LOSS, records).svg == plain
        assert mpl.rcParams["font.size"] == 30
