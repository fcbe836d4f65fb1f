"""The fisher suite: its float64 truth, that every implementation is right, and that it refuses what is wrong."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from bench.harness import machine
from bench.harness.measure import WrongResult
from bench.suites import ewc, fisher
from fastalign import reference

TINY = [fisher.Case("layers", 3, 5), fisher.Case("body", 2, 5), fisher.Case("ewc", 1)]


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    monkeypatch.setattr(fisher, "BODY_BLOCKS", 1)
    monkeypatch.setattr(fisher, "BODY_VOCAB", 512)


def test_the_truth_is_the_definition_in_float64():
    case = TINY[0]
    operands, _ = of = fisher.setup(case)
    truth = fisher.Truth(case, of)
    for i, (g, x) in enumerate(operands):
        start = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64)
        exact = reference.accumulate_fisher(start, g.double(), x.double(), torch.tensor([0, 5, 10, 15]))
        torch.testing.assert_close(truth.exact[f"layer {i}"], exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.kind)
def test_every_implementation_is_right(case):
    of = fisher.setup(case)
    truth = fisher.Truth(case, of)
    absent = "BackPACK BatchGrad" if find_spec("backpack") is None else None  # a peer, which only the bench installs
    functions = {name: function for name, function in fisher.functions(case).items() if name != absent}
    for _ in range(2):  # EWC adds to what is there
        for name, function in functions.items():
            errors = truth.check(name, function(*of)).errors
            sort = {fisher.FLOOR: "product", fisher.ORDINARY: "gradient"}.get(name, "fisher")
            assert errors.keys() == ({"penalty", "gradient"} if case.kind == "ewc" else {sort})
            assert max(errors.values()) < (1e-5 if "fastalign" in name else fisher.BUDGET[case.kind])


def test_every_kind_of_case_has_a_truth_and_implementations():
    for case in (fisher.CASES | fisher.QUICK).values():
        assert {"fastalign"} < fisher.functions(case).keys() and case.kind in fisher.TRUTH
    used = {name for case in fisher.CASES.values() for name in fisher.functions(case)}
    assert used == {fisher.FLOOR, *fisher.IMPLEMENTATIONS}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: out | {"layer 0": out["layer 0"] * 1.001},
        lambda out: out | {"layer 6": out["layer 6"].roll(1, 0)},
        lambda out: out | {"layer 3": out["layer 3"] * float("nan")},
        lambda out: {name: value for name, value in out.items() if name != "layer 2"},
        lambda out: {"product": out["layer 0"]},
    ],
)
def test_wrong_results_are_refused(wrong):
    of = fisher.setup(TINY[0])
    truth, right = fisher.Truth(TINY[0], of), fisher.layers_loop(*of)
    truth.check(fisher.LOOP, right)
    with pytest.raises(WrongResult):
        truth.check(fisher.LOOP, wrong(right))


def test_a_gradient_that_is_written_instead_of_added_is_refused():
    parameters, anchors, fishers = of = fisher.setup(TINY[2])
    truth = fisher.Truth(TINY[2], of)
    outputs = ewc.plain(parameters, anchors, fishers)
    parameters[0].grad.copy_(ewc.STRENGTH * fishers[0] * (parameters[0].detach() - anchors[0]))
    with pytest.raises(WrongResult, match="gradient of 0"):
        truth.check("torch", outputs)


def test_ewc_has_the_tensors_of_the_model():
    parameters = ewc.tensors(1)[0]
    assert len(parameters) == 1 + 9 + 1 and all(p.grad is not None for p in parameters)
    blocks = sum(p.numel() for p in parameters[1:-1])
    assert ewc.VOCAB * ewc.HIDDEN + ewc.BLOCKS * blocks + ewc.HIDDEN == 134_515_008  # SmolLM2-135M's


def test_a_record_of_ewc_has_the_bytes_that_must_move_and_the_copy_rate(monkeypatch):
    monkeypatch.setitem(fisher.CASES, "ewc", TINY[2])
    monkeypatch.setattr(fisher, "IMPLEMENTATIONS", {"torch": {"ewc": ewc.plain}})
    monkeypatch.setattr(fisher, "memory_in_fresh_process", lambda *names: None)
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 12)
    (record,) = fisher.run("ewc", rounds=2, limit_s=60)
    entries = sum(p.numel() for p in ewc.tensors(1)[0])
    assert record.sizes["bytes"] == 5 * 4 * entries and record.sizes["copy_bytes_per_s"] > 0


def test_a_loop_over_the_limit_is_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setitem(fisher.QUICK, TINY[0].name, TINY[0])
    monkeypatch.setattr(fisher, "memory_in_fresh_process", lambda *names: None)
    records = fisher.run(TINY[0].name, rounds=2, limit_s=0)
    assert {"fastalign", fisher.FLOOR} < {r.implementation for r in records}
    assert fisher.LOOP not in {r.implementation for r in records}
    assert f"skipped {fisher.LOOP}" in capsys.readouterr().err
