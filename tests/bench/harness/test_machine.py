"""The machine suite: what it counts, that every case runs, and that a wrong result is not timed."""

from __future__ import annotations

import pytest
import torch

from bench.harness import machine


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(machine, "SIZE", 80)
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 12)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("copy", {"bytes": 2 * 4096}),
        ("product-float32", {"flop": 2 * 80**3}),
        ("product-bfloat16", {"flop": 2 * 80**3}),
    ],
)
def test_each_case_counts_what_it_moves_or_does(case, sizes):
    records = machine.run(case, rounds=2, limit_s=1)
    both = case == "product-float32" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert [record.implementation for record in records] == ["torch", "oneDNN"][: 1 + both]
    for record in records:
        assert (record.suite, record.case, record.sizes, record.runs) == ("machine", case, sizes, 2)


def test_every_case_is_tested_here():
    assert set(machine.CASES) == {"copy", "product-float32", "product-bfloat16"} >= set(machine.QUICK)


def test_a_wrong_product_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(machine.PRODUCTS, "torch", lambda a, b: a @ b + 1)
    assert not any(m.implementation == "torch" for m in machine.run("product-float32", rounds=2, limit_s=1))
    assert "REFUSED torch: product is off by 1" in capsys.readouterr().err


def test_what_takes_too_long_is_left_out(capsys):
    assert machine.run("product-float32", rounds=2, limit_s=0) == []
    assert "skipped torch: 1/16 of the rows took" in capsys.readouterr().err


def test_one_round_is_its_own_median():
    (record,) = machine.run("copy", rounds=1, limit_s=1)
    assert record.runs == 1 and record.q1_s == record.median_s == record.q3_s > 0
