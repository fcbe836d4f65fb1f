"""Which plots there are for which records, and what stands in them."""

from __future__ import annotations

import dataclasses

import pytest

from bench.pages import plots


def of_vocabulary(record, v, **fields):
    sizes = {"n": 4, "h": 2, "v": v, "mask": 0}
    return record(case=f"frozen-float32-4x2x{v}-mask0", sizes=sizes, **fields)


@pytest.fixture
def machine(record):
    copy = record(suite="machine", case="copy", implementation="torch", sizes={"bytes": 10**9}, median_s=0.1)
    product = record(suite="machine", case="product-float32", implementation="torch", sizes={"flop": 10**10})
    return [copy, product]


@pytest.fixture
def drawn(monkeypatch):
    """The figures themselves, as they are turned into PNGs."""
    figures, png = [], plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: figures.append(figure) or png(figure))
    return figures


def test_memory_is_drawn_where_there_are_two_vocabularies(record, drawn):
    one = of_vocabulary(record, 8)
    assert plots.all_of([one]) == {}
    assert plots.all_of([one, of_vocabulary(record, 16, peak_extra_bytes=None)]) == {}, "memory was not measured"
    floor = of_vocabulary(record, 8, implementation="2 matrix products")
    made = plots.all_of([of_vocabulary(record, 16, peak_extra_bytes=7 << 20), one, floor])
    assert list(made) == ["memory-frozen-float32-4x2-mask0"]
    assert made["memory-frozen-float32-4x2-mask0"].startswith(b"\x89PNG\r\n")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert lines["eager"].get_xydata().tolist() == [[8, 5], [16, 7]], "in order of V, in MiB"
    assert lines["2 matrix products"].get_linestyle() == ":"


def test_curves_are_labelled_with_their_power(curve, drawn):
    made = plots.all_of([*curve(power=1.5), *curve(axis="t", power=2.0, threads=2)])
    assert list(made) == ["curves"] and made["curves"].startswith(b"\x89PNG\r\n")
    labels = {axes.get_xlabel(): [line.get_label() for line in axes.lines] for axes in drawn[0].axes}
    assert labels == {"N": ["1 thread: power 1.50"], "T": ["2 threads: power 2.00"]}


def test_the_slope_is_the_power_whatever_the_factor():
    points = [0, 1, 2, 8, 64]  # a share of 0 has no logarithm
    assert plots.slope(points, [9.0, *(0.3 * p**1.25 for p in points[1:])]) == pytest.approx(1.25)


def test_the_roofline_needs_the_machine(record, machine, drawn):
    rows = [record(), record(implementation="2 matrix products")]
    assert plots.all_of(rows) == {}
    assert plots.all_of(machine) == {}
    assert plots.all_of([*rows, machine[1]]) == {}, "without a copy there is no roof"
    other = [dataclasses.replace(row, threads=row.threads + 1) for row in rows]
    assert plots.all_of([*other, *machine]) == {}, "another number of threads has another roof"
    made = plots.all_of([*rows, *other, *machine])
    assert list(made) == ["roofline"] and made["roofline"].startswith(b"\x89PNG\r\n")
    (axes,) = drawn[0].axes
    assert [c.get_label() for c in axes.collections] == ["eager"], "the floor is the roof, no point below it"
    # 2 products of 2*4*2*8 FLOP; weight (8, 2), hidden and its gradient (4, 2) each, of 4 bytes.
    (point,) = axes.collections[0].get_offsets().tolist()
    assert point == pytest.approx([256 / 128, 256 / 0.2 / 1e9])
    roof = axes.lines[0].get_xydata().tolist()
    rate, bandwidth = 10**10 / 0.2, 10**9 / 0.1
    assert roof[0] == pytest.approx([rate / bandwidth / 8, rate / 8 / 1e9]) and roof[1][1] == pytest.approx(rate / 1e9)


def test_the_fastest_product_is_the_roof(record, machine, drawn):
    copy, product = machine
    faster = dataclasses.replace(product, implementation="oneDNN", q1_s=0.05, median_s=0.05)
    for both in ([product, faster], [faster, product]):
        plots.all_of([record(), copy, *both])
        roof = drawn.pop().axes[0].lines[0].get_ydata()[-1]
        assert roof == pytest.approx(product.sizes["flop"] / faster.median_s / 1e9)
