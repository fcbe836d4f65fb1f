"""Diagnostics as functions of logged lines. They are seen to fire on real runs in tests/bench/suites."""

from __future__ import annotations

import json
import math

import pytest

from fastalign.report.diagnostics import DIAGNOSTICS, Logged, diagnose, find


def lines(**metrics):
    """A line per step from 1 on: each metric is a list, or a function of the step."""
    count = max(len(values) for values in metrics.values() if isinstance(values, list))
    at = {key: values if isinstance(values, list) else [values] * count for key, values in metrics.items()}
    return [{"step": i + 1, **{key: values[i] for key, values in at.items()}} for i in range(count)]


def names(records, **files):
    return [finding.name for finding in find(Logged(records, **files))]


def falling(count, start=2.0, end=1.0):
    return [start + (end - start) * i / (count - 1) for i in range(count)]


def test_a_run_of_nothing_or_of_a_few_lines_is_quiet(tmp_path):
    assert names([]) == [] and names([{}, {"step": "x", "loss": None}, {"loss": 1.0}]) == []
    assert diagnose(tmp_path) == []
    for count in range(1, 6):
        assert names(lines(loss=[2.0] * count, grad_norm=1.0, learning_rate=1e-4)) == []


def test_a_jump_needs_more_than_the_noise_of_small_batches():
    losses = [2.0, 1.9, 2.1, 1.0, 0.5, 0.4, 0.6, 0.1, 0.05, 1.9, 0.1, 0.02, 0.01, 0.9]
    assert "loss_spike" not in names(lines(loss=losses))
    assert "loss_spike" in names(lines(loss=[*losses, 9.0]))
    norms = [1.0, 1.1, 0.9, 1.0, 1.2, 1.0]
    assert "exploding_gradient" not in names(lines(loss=falling(7), grad_norm=[*norms, 5.0]))
    assert "exploding_gradient" in names(lines(loss=falling(7), grad_norm=[*norms, 30.0]))


def test_a_gradient_that_grows_over_a_few_lines_explodes_too():
    """Each line is less than twice the one before; what a run with a rate that rises shows."""
    norms = [0.56, 0.53, 0.49, 0.59, 0.85, 0.91, 1.44, 1.41, 4.84, 9.18, 12.81, 11.56, 9.64]
    assert "exploding_gradient" in names(lines(loss=falling(13), grad_norm=norms))
    for noisy in ([*norms[:9], 4.0, 3.0, 2.0, 1.0], [*norms[:8], 9.0, 1.0, 9.0, 1.0, 9.0], [1.5**i for i in range(13)]):
        assert "exploding_gradient" not in names(lines(loss=falling(13), grad_norm=noisy))


def test_a_plateau_moves_by_the_noise_of_its_batches():
    """The last quarter is 1 % lower by chance, as of 60 lines with a deviation of 8 %."""
    noise = [0.08 * (-1) ** i for i in range(80)]
    losses = [3.0 - 0.1 * i for i in range(20)] + [1.0 + x for x in noise[:40]] + [0.99 + x for x in noise[60:]]
    flat = {"grad_norm": 1.0, "learning_rate": 1e-3}
    assert names(lines(loss=losses, **flat)) == ["plateau"]
    slowly = [value - 0.002 * max(0, i - 40) for i, value in enumerate(losses)]
    assert names(lines(loss=slowly, **flat)) == []
    hidden = [value + 0.4 * (-1) ** i * (i >= 20) for i, value in enumerate(losses)]
    assert "plateau" not in names(lines(loss=[v - 0.05 * (i >= 60) for i, v in enumerate(hidden)], **flat))


def test_a_gradient_vanishes_only_where_the_loss_is_high():
    norms = [1.0] * 6 + [1e-5] * 10
    assert names(lines(loss=falling(16, 2, 1.5), grad_norm=norms)) == ["vanishing_gradient"]
    assert names(lines(loss=falling(16, 2, 0.0), grad_norm=norms)) == []


def test_a_flat_loss_at_the_end_of_a_schedule_is_no_plateau():
    losses = [3.0 - 0.1 * i for i in range(20)] + [1.0] * 60
    assert names(lines(loss=losses, grad_norm=1.0, learning_rate=1e-3)) == ["plateau"]
    assert names(lines(loss=losses, grad_norm=1.0, learning_rate=falling(80, 1e-3, 0.0))) == []
    assert names(lines(loss=falling(80), grad_norm=1.0, learning_rate=1e-3)) == []


def test_margins_that_moved_speak_against_an_idle_rate():
    flat = {"loss": [0.6931] * 24, "grad_norm": 1.0, "learning_rate": 1e-6, "rewards/accuracies": 0.7}
    assert names(lines(**flat, **{"rewards/margins": [1e-4] * 24})) == ["learning_rate_idle"]
    assert names(lines(**flat, **{"rewards/margins": falling(24, 0, 0.3)})) == []
    assert names(lines(**{**flat, "grad_norm": 0.0}, **{"rewards/margins": [1e-4] * 24})) == ["vanishing_gradient"]


def test_lines_of_a_step_logged_twice_count_once():
    records = lines(loss=falling(8), adapter_norm=[1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    assert names(records) == []
    assert Logged([*records, {"step": 8, "loss": 7.0}]).values("loss")[-1] == 7.0


def test_not_finite_comes_from_the_lines_or_from_the_guard(tmp_path):
    assert names(lines(loss=[2.0, math.nan])) == ["not_finite"]
    assert names(lines(loss=[2.0, 1.0], grad_norm=[math.inf, 1.0])) == []  # fp16's scaler starts like this
    row = {"step": 3, "not_finite": "gradient", "prompt": "<b>\x1b[2J"}
    (tmp_path / "nonfinite_rows.jsonl").write_text(json.dumps(row) + "\n")
    (finding,) = diagnose(tmp_path)
    assert "step 3 the gradient of 1 rows" in finding.evidence and "\x1b" not in finding.evidence


def test_samples_are_compared_with_those_before():
    def samples(before, after):
        return [{"before": b, "after": a} for b, a in zip(before, after, strict=True)]

    texts = [f"The answer to question {i} is a sentence of its own." for i in range(6)]
    assert names([], samples=samples(texts, texts[::-1])) == []
    assert names([], samples=samples(texts, ["No."] * 6)) == ["length_collapse", "diversity_collapse"]
    assert names([], samples=samples(texts, ["abc " * 40 + str(i) for i in range(6)])) == ["diversity_collapse"]
    assert names([], samples=samples(["No."] * 6, ["No."] * 6)) == []
    assert names([], samples=[{}, {"before": None, "after": "a"}, {"before": 3}]) == []


@pytest.mark.parametrize(
    ("before", "after", "fires"), [(90, 20, True), (90, 60, False), (20, 0, False), (None, 0, False)]
)
def test_answers_that_do_not_end(before, after, fires):
    row = {"metric": "Answers that end by themselves", "before": before, "after": after}
    assert (names([], summary={"rows": [row, None]}) == ["answers_do_not_end"]) is fires


def test_the_table_is_whole():
    assert len({row.name for row in DIAGNOSTICS}) == len(DIAGNOSTICS) >= 12
    assert all(row.check.__doc__ and row.remedy and row.title for row in DIAGNOSTICS)
