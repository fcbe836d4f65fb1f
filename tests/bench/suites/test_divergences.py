"""The divergences suite: its float64 truth, that right implementations pass, and that it refuses what is wrong."""

from __future__ import annotations

import pytest
import torch

from bench.__main__ import chosen
from bench.harness.measure import Missing, WrongResult
from bench.suites import divergences
from fastalign import reference
from fastalign.errors import BackendError

KINDS = reference.DIVERGENCES


def tiny(kind, mask=50):
    return divergences.make_inputs(divergences.Case(kind, 24, 16, 50, mask))


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_the_definition_in_float64(kind):
    inputs = tiny(kind)
    truth = divergences.Truth(kind, inputs)
    hidden, *others = (t.double() for t in inputs[:4])
    hidden.requires_grad_()
    loss = reference.linear_divergence(hidden, *others, divergence=kind)[inputs.mask].mean()
    (grad,) = torch.autograd.grad(loss, hidden)
    assert truth.exact["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(truth.exact["d_hidden"], grad[inputs.mask], rtol=1e-12, atol=1e-15)
    assert 0.005 < loss < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [0, 50])
def test_right_implementations_pass(mask, kind):
    inputs, passed = tiny(kind, mask), []
    truth = divergences.Truth(kind, inputs)
    for name in (divergences.FLOOR, *divergences.IMPLEMENTATIONS):
        if name in divergences.COMPILES:
            continue
        try:
            outputs = divergences.candidate(name, kind, inputs)()
        except (Missing, BackendError):
            continue
        truth.check(name, outputs)
        passed.append(name)
    assert {divergences.FLOOR, "fastalign torch", "eager"} <= set(passed)


WRONG = {
    "another loss": lambda out: out | {"loss": out["loss"] * 1.001},
    "not a number": lambda out: out | {"loss": out["loss"] * float("nan")},
    "another sign": lambda out: out | {"d_hidden": -out["d_hidden"]},
    "the sum's gradient": lambda out: out | {"d_hidden": 12 * out["d_hidden"]},
    "no gradient": lambda out: {"loss": out["loss"]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_results_are_refused(wrong):
    inputs = tiny("jsd")
    right = divergences.candidate("eager", "jsd", inputs)()
    with pytest.raises(WrongResult):
        divergences.Truth("jsd", inputs).check("eager", WRONG[wrong](right))


@pytest.mark.parametrize("quick", [False, True])
def test_its_cases_are_found_by_name(quick):
    cases = chosen(divergences, ["*-mask50"], quick)
    assert [case.split("-")[0] for case in cases] == list(KINDS)
    assert all(("256x64x4096" in case) == quick for case in cases)


def test_a_quick_run_checks_times_and_weighs(monkeypatch):
    case = divergences.Case("jsd", 32, 16, 50, 50)
    monkeypatch.setitem(divergences.QUICK, case.name, case)
    monkeypatch.setattr(divergences, "IMPLEMENTATIONS", {"eager": divergences.IMPLEMENTATIONS["eager"]})
    weighed = []
    monkeypatch.setattr(divergences, "memory_of", lambda suite, case, name, make: weighed.append(name))
    floor, ours = divergences.run(case.name, rounds=2, limit_s=60)
    assert [floor.implementation, ours.implementation] == weighed == ["3 matrix products", "eager"]
    assert ours.suite == "divergences" and ours.runs == 2 and ours.sizes == {"n": 32, "h": 16, "v": 50, "mask": 50}
    assert divergences.memory(case.name, "eager") > 0
