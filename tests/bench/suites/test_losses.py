"""The losses suite: its float64 truth against autograd through the definition, and that it refuses what is wrong."""

from __future__ import annotations

import pytest
import torch

from bench.harness.measure import Missing, WrongResult
from bench.suites import losses
from fastalign import reference
from fastalign.errors import BackendError
from fastalign.ops.backends import cpu


def tiny(loss, kind="trainable", dtype="float32"):
    case = losses.Case(loss, kind, dtype, 4, 8, 16, 200)
    return case, losses.make_inputs(case)


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_the_truth_is_the_definition_in_float64(loss):
    case, inputs = tiny(loss)
    truth = losses.Truth(case, inputs)
    hidden, weight = (t.double().requires_grad_() for t in inputs[:2])
    value = losses.loss_of(loss, reference.linear_logprobs(hidden, weight, inputs.targets), inputs)
    d_hidden, d_weight = torch.autograd.grad(value, (hidden, weight))
    wanted = {"loss": value.detach(), "d_hidden": d_hidden.flatten(0, 1)[truth.rows], "d_weight": d_weight[truth.words]}
    for output, want in wanted.items():
        # float64 rounds sums of at most 200 terms of size below 10.
        torch.testing.assert_close(truth.exact[output], want, rtol=0, atol=200 * 10 * 2.3e-16)
    assert truth.exact["d_hidden"].abs().max() > 1e-4  # no loss is saturated


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", losses.KINDS)
@pytest.mark.parametrize("loss", losses.LOSSES)
def test_right_implementations_pass(loss, kind, dtype):
    case, inputs = tiny(loss, kind, dtype)
    truth, passed = losses.Truth(case, inputs), []
    for name in losses.names(case):
        if name in losses.COMPILES:
            continue
        try:
            outputs = losses.candidate(name, case, inputs)()
        except (Missing, BackendError):
            continue
        truth.check(name, outputs)
        passed.append(name)
    assert {"fastalign torch", "eager"} <= set(passed)
    assert "fastalign cpu" in passed or cpu.why_not(inputs.hidden)


WRONG = {
    "the loss of other pairs": lambda out: out | {"loss": out["loss"] * 1.05},
    "not a number": lambda out: out | {"loss": out["loss"] * float("nan")},
    "another sign": lambda out: out | {"d_hidden": -out["d_hidden"]},
    "chosen for rejected": lambda out: out | {"d_hidden": out["d_hidden"].roll(2, 0)},
    "a weight that got no gradient": lambda out: out | {"d_weight": torch.zeros_like(out["d_weight"])},
    "no d_weight": lambda out: {name: value for name, value in out.items() if name != "d_weight"},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("loss", losses.LOSSES)
def test_wrong_results_are_refused(loss, wrong):
    case, inputs = tiny(loss)
    right = losses.candidate("eager", case, inputs)()
    truth = losses.Truth(case, inputs)
    truth.check("eager", right)
    with pytest.raises(WrongResult):
        truth.check("eager", WRONG[wrong](right))


def test_half_of_the_tokens_are_prompt():
    _, inputs = tiny("dpo")
    assert (inputs.targets >= 0).sum(1).tolist() == [4] * 4


def test_a_loss_that_a_peer_lacks_is_said(capsys, monkeypatch):
    case = losses.Case("ipo", "frozen", "float32", 4, 8, 16, 200)
    monkeypatch.setitem(losses.CASES, case.name, case)
    monkeypatch.setattr(losses, "memory_of", lambda *names: None)
    only = {name: losses.IMPLEMENTATIONS[name] for name in ("eager", "Liger")}
    monkeypatch.setattr(losses, "IMPLEMENTATIONS", only)
    records = losses.run(case.name, rounds=2, limit_s=60)
    assert [record.implementation for record in records] == ["2 matrix products", "eager"]
    assert "skipped Liger" in capsys.readouterr().err
