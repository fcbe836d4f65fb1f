"""The scale suite: what varies along each curve, and what stays."""

from __future__ import annotations

import pytest

from bench.__main__ import chosen
from bench.suites import scale
from fastalign.data.packing import pack


def sizes(axis, point):
    """[(tokens of the prompt, of each completion)]"""
    return [(len(r["prompt_ids"]), [len(c) for c in r["completion_ids"]]) for r in scale._rows(axis, point)]


@pytest.mark.parametrize("point", scale.POINTS["prompt"])
def test_the_share_of_prompt_varies_and_the_tokens_do_not(point):
    ((prompt, completions),) = sizes("prompt", point)
    total = prompt + sum(completions)
    assert total == scale.PAIR[0] + 2 * scale.PAIR[1]
    assert 100 * prompt == point * total and completions[0] == completions[1]


@pytest.mark.parametrize("point", scale.POINTS["t"])
def test_completions_grow(point):
    assert sizes("t", point) == [(scale.PAIR[0], [point, point])]


@pytest.mark.parametrize("point", scale.POINTS["batch"])
def test_pairs_grow_in_number(point):
    assert sizes("batch", point) == [(scale.PAIR[0], [scale.PAIR[1]] * 2)] * point


@pytest.mark.parametrize("axis", ["t", "batch", "prompt"])
def test_rows_are_packed_and_the_same_each_time(axis):
    for point in scale.POINTS[axis]:
        rows = scale._rows(axis, point)
        assert rows == scale._rows(axis, point)
        scored = sum(len(c) for row in rows for c in row["completion_ids"])
        # without a prompt nothing predicts a completion's first token
        assert int(pack(rows).cu_seqlens[-1]) == scored - (2 if point == 0 else 0)


def test_quick_curves_are_the_beginnings_of_full_ones():
    assert chosen(scale, None, True) == ["n-1-thread-quick", "v-1-thread-quick"]
    assert chosen(scale, None, False) == list(scale.CASES) and len(scale.CASES) == 12
    assert scale.QUICK["n-1-thread-quick"].points == scale.POINTS["n"][:2]


def test_a_curve_has_a_record_a_point_each_checked(monkeypatch):
    monkeypatch.setattr(scale, "WIDTH", 16)
    monkeypatch.setattr(scale, "VOCABULARY", 64)
    monkeypatch.setitem(scale.POINTS, "n", (16, 32))
    records = scale.run("n-1-thread", rounds=2, limit_s=1)
    assert [(m.sizes, m.implementation) for m in records] == [({"n": 16}, "n = 16"), ({"n": 32}, "n = 32")]
    assert all(m.errors.keys() == {"logprobs", "d_hidden"} and m.threads == 1 for m in records)
