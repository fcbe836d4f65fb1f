"""The trl suite: what it accepts as the same step."""

from __future__ import annotations

import math

import pytest
import torch

from bench.harness.measure import WrongResult
from bench.suites import trl

TRLS = {"loss": torch.tensor([0.7]), "entropy": torch.tensor([2.0]), "logps/chosen": torch.tensor([-500.0])}


def step(**changed):
    return TRLS | {name.replace("_", "/"): torch.tensor([value]) for name, value in changed.items()}


def test_equal_steps_pass():
    checked = trl.check("TRL + fastalign", step(logps_chosen=-500.001), TRLS)
    assert checked.errors.keys() == TRLS.keys() and checked.errors["logps/chosen"] == pytest.approx(2e-6, rel=0.1)
    assert "entropy" not in trl.check(trl.WITHOUT_ENTROPY, step(entropy=math.nan), TRLS).errors


@pytest.mark.parametrize("changed", [{"loss": 0.7001}, {"loss": math.nan}, {"entropy": 2.1}, {"logps_chosen": -501.0}])
def test_another_step_is_refused(changed):
    with pytest.raises(WrongResult, match="is off by"):
        trl.check("TRL + fastalign", step(**changed), TRLS)


def test_a_missing_metric_is_refused():
    with pytest.raises(WrongResult, match="it has"):
        trl.check("TRL + fastalign", {"loss": TRLS["loss"]}, TRLS)


def test_cases():
    assert {case.tuning for case in trl.CASES.values()} == {"lora", "full"} and trl.QUICK.keys() <= trl.CASES.keys()
