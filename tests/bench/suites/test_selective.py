"""The selective suite: its float64 truth against the definition, and that it refuses what is wrong."""

from __future__ import annotations

import pytest
import torch

from bench.harness import machine
from bench.harness.measure import Missing, WrongResult
from bench.suites import selective
from fastalign import reference
from fastalign.errors import BackendError


def tiny(kind="backward", dtype="float32"):
    return selective.make_inputs(selective.Case(kind, dtype, 24, 50))


def test_the_truth_is_the_definition_in_float64():
    inputs = tiny()
    truth = selective.Truth("backward", inputs)
    logits = inputs.logits.double().requires_grad_()
    logprobs = reference.selective_logprobs(logits, inputs.targets)
    (d_logits,) = torch.autograd.grad(logprobs, logits, inputs.grads.double())
    torch.testing.assert_close(truth.exact["logprobs"], logprobs.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(truth.exact["d_logits"], d_logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", selective.DTYPES)
@pytest.mark.parametrize("kind", selective.PASSES)
def test_right_implementations_pass(kind, dtype):
    inputs, passed = tiny(kind, dtype), []
    truth = selective.Truth(kind, inputs)
    for name in selective.IMPLEMENTATIONS:
        try:
            outputs = selective.candidate(name, kind, inputs)()
        except (Missing, BackendError):
            continue
        assert truth.check(name, outputs).errors.keys() == truth.exact.keys()
        passed.append(name)
    assert {"fastalign torch", "eager", "torch cross_entropy"} <= set(passed)


@pytest.mark.parametrize("dtype", selective.DTYPES)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: out | {"logprobs": out["logprobs"].roll(1)},
        lambda out: out | {"logprobs": out["logprobs"] * float("nan")},
        lambda out: out | {"d_logits": -out["d_logits"]},
        lambda out: out | {"d_logits": out["d_logits"].roll(1, 1)},
        lambda out: {"logprobs": out["logprobs"]},
    ],
)
def test_wrong_results_are_refused(wrong, dtype):
    inputs = tiny(dtype=dtype)
    right = selective.candidate("eager", "backward", inputs)()
    truth = selective.Truth("backward", inputs)
    truth.check("eager", right)
    with pytest.raises(WrongResult):
        truth.check("eager", wrong(right))


@pytest.mark.parametrize(("kind", "passes"), [("forward", 1), ("backward", 3)])
def test_a_record_has_the_bytes_that_must_move_and_the_copy_rate(kind, passes, monkeypatch):
    case = selective.Case(kind, "bfloat16", 32, 50)
    monkeypatch.setitem(selective.CASES, case.name, case)
    monkeypatch.setattr(selective, "IMPLEMENTATIONS", {"eager": selective.eager})
    monkeypatch.setattr(selective, "memory_of", lambda *names: None)
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 12)
    (record,) = selective.run(case.name, rounds=2, limit_s=60)
    assert record.implementation == "eager" and record.sizes["bytes"] == passes * 32 * 50 * 2
    assert record.sizes["copy_bytes_per_s"] > 0
