"""Every diagnostic fires on a run that was made to fail that way; some sound runs stay quiet.

`python -m bench.suites.diagnostics` holds all twenty sound runs.
"""

from __future__ import annotations

import pytest

from bench.suites.diagnostics import PLANTED, SOUND, run, start_model
from fastalign.report.diagnostics import DIAGNOSTICS

FEW = ("sft-full-held-out", "dpo-lora", "kto")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return start_model(tmp_path_factory.mktemp("diagnostics"))


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: case.name)
def test_a_planted_fault_is_seen(case, start):
    folder, fired = run(case, start.parents[1], start)
    assert case.expected in fired
    assert (folder / "metrics.jsonl").exists() or case.expected == "not_finite"


@pytest.mark.parametrize("case", [case for case in SOUND if case.name in FEW], ids=lambda case: case.name)
def test_a_sound_run_stays_quiet(case, start):
    assert run(case, start.parents[1], start)[1] == []


def test_every_diagnostic_has_a_planted_fault():
    assert {case.expected for case in PLANTED} == {row.name for row in DIAGNOSTICS}
    assert len(SOUND) == 20 and len(set(FEW)) == 3
