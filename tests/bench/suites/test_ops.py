"""The ops suite: its float64 truth against the definition, and that it refuses what is wrong."""

from __future__ import annotations

import pytest
import torch

from bench.__main__ import chosen
from bench.harness.measure import Missing, WrongResult
from bench.suites import ops
from fastalign import reference
from fastalign.errors import BackendError
from fastalign.ops.backends import cpu

KINDS = list(ops.FLOOR)


def tiny(kind, dtype="float32", mask=50):
    return ops.make_inputs(ops.Case(kind, dtype, 24, 16, 50, mask))


def definition(inputs):
    """Log-probs and gradients of all rows by autograd through the reference, in float64."""
    hidden, weight = (t.double().requires_grad_() for t in inputs[:2])
    logprobs = reference.linear_logprobs(hidden, weight, inputs.targets)
    d_hidden, d_weight = torch.autograd.grad(logprobs, (hidden, weight), inputs.grads.double())
    return {"logprobs": logprobs.detach(), "d_hidden": d_hidden, "d_weight": d_weight}


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_the_definition_in_float64(kind):
    truth = ops.Truth(kind, tiny(kind))
    exact = definition(truth.inputs)
    for output in truth.exact.keys() - {"products"}:
        rows = truth.words if output == "d_weight" else truth.rows
        # float64 rounds sums of at most 50 terms of size below 10.
        torch.testing.assert_close(truth.exact[output], exact[output][rows], rtol=0, atol=50 * 10 * 2.3e-16)


@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_right_implementations_pass(kind, dtype):
    inputs = tiny(kind, dtype)
    truth = ops.Truth(kind, inputs)
    present = [name for name in ops.names(kind) if name not in ops.COMPILES]
    passed = []
    for name in present:
        try:
            outputs = ops.candidate(name, kind, inputs)()
        except (Missing, BackendError):
            continue
        errors = truth.check(name, outputs).errors
        assert errors.keys() == ({"products"} if name not in ops.IMPLEMENTATIONS else truth.exact.keys() - {"products"})
        passed.append(name)
    assert {ops.products_name(ops.FLOOR[kind]), "fastalign torch", "eager"} <= set(passed)
    assert "fastalign cpu" in passed or cpu.why_not(inputs.hidden, inputs.weight, None)


WRONG = {
    "the next token's": lambda out: out | {"logprobs": out["logprobs"].roll(1)},
    "a constant off": lambda out: out | {"logprobs": out["logprobs"] + 0.5},
    "not a number": lambda out: out | {"logprobs": out["logprobs"] * float("nan")},
    "another sign": lambda out: out | {"d_hidden": -out["d_hidden"]},
    "one row of d_weight": lambda out: out | {"d_weight": out["d_weight"].index_fill(0, torch.tensor([0]), 0.0)},
    "no d_weight": lambda out: {name: value for name, value in out.items() if name != "d_weight"},
}


@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_results_are_refused(wrong, dtype):
    inputs = tiny("trainable", dtype)
    right = ops.candidate("eager", "trainable", inputs)()
    truth = ops.Truth("trainable", inputs)
    truth.check("eager", right)
    with pytest.raises(WrongResult):
        truth.check("eager", WRONG[wrong](right))


def test_a_gradient_without_its_expectation_is_refused():
    """`W[y]` alone, in bfloat16, where budgets are widest."""
    inputs = tiny("frozen", "bfloat16", mask=0)
    right = ops.candidate("eager", "frozen", inputs)()
    d_hidden = inputs.weight[inputs.targets] * inputs.grads[:, None]
    with pytest.raises(WrongResult, match="d_hidden"):
        ops.Truth("frozen", inputs).check("eager", right | {"d_hidden": d_hidden})


def test_a_wrong_implementation_leaves_no_record(monkeypatch, capsys):
    case = ops.Case("forward", "float32", 32, 16, 50, 50)
    monkeypatch.setitem(ops.CASES, case.name, case)
    broken = {"fastalign torch": ops.IMPLEMENTATIONS["fastalign torch"], "broken": lambda: broken_logprobs}
    monkeypatch.setattr(ops, "IMPLEMENTATIONS", broken | {"absent": absent})
    monkeypatch.setattr(ops, "memory_of", lambda *names: None)
    records = ops.run(case.name, rounds=2, limit_s=60)
    assert [record.implementation for record in records] == ["1 matrix product", "fastalign torch"]
    said = capsys.readouterr().err
    assert set(records[0].skipped) == {"broken", "absent"} and records[0].skipped == records[1].skipped
    assert "REFUSED broken" in said and "skipped absent: it is not here" in said


def broken_logprobs(hidden, weight, targets):
    return (hidden @ weight.T).float()[torch.arange(len(targets)), targets.clamp(min=0)]  # forgets the normaliser


def absent():
    raise Missing("it is not here")


def test_what_is_too_slow_is_named(monkeypatch, capsys):
    case = ops.Case("forward", "float32", 32, 16, 50, 50)
    monkeypatch.setitem(ops.CASES, case.name, case)
    monkeypatch.setattr(ops, "IMPLEMENTATIONS", {"eager": lambda: ops.eager})
    monkeypatch.setattr(ops, "memory_of", lambda *names: None)
    (floor,) = ops.run(case.name, rounds=2, limit_s=0)
    assert floor.implementation == "1 matrix product", "without a floor a table says little"
    assert "skipped eager: 1/16 of the rows took over half the limit of 0 s" in capsys.readouterr().err


def test_masks_hide_the_share_they_say():
    inputs = ops.make_inputs(ops.Case("forward", "float32", 40, 4, 8, 80))
    assert (inputs.targets >= 0).sum() == 8
    assert torch.equal(inputs.grads != 0, inputs.targets >= 0)


def test_cases_are_chosen_by_pattern():
    assert chosen(ops, None, True) == list(ops.QUICK)
    assert chosen(ops, ["frozen-float32-2048x576x49152-mask*"], False) == [
        f"frozen-float32-2048x576x49152-mask{mask}" for mask in ops.MASKS
    ]
    with pytest.raises(SystemExit, match="no case matches"):
        chosen(ops, ["nothing"], False)
