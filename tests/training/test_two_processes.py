"""Two processes that torchrun starts make the update of one: the short form of tests/soak/two_processes.py.

All cases run one after the other in one group of processes, because to start two of them takes as long as all cases.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "soak"))
import ranks
import scenarios
import two_processes

from fastalign.errors import ConfigError

# One process of pytest runs all of these, so that the runs are made once.
pytestmark = pytest.mark.xdist_group("two processes")

CASES = [
    "sft, LoRA", "sft, two micro-batches", "dpo, stored reference", "orpo", "kto", "bco", "reward, LoRA",
    "distillation, stored", "dpo, EWC + KL + replay", "sft, layer-wise", "fsdp, dpo, live reference",
]  # fmt: skip


# The last one breaks the group of processes.
SCENARIOS = [
    "keyed parts",
    "shared reference",
    "evaluation",
    "not finite",
    "signals",
    "sharded",
    "other count",
    "one fails",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the runs of two processes, and what one process trained, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    process = two_processes.torchrun(folder / "two", [*CASES, *SCENARIOS])
    try:
        one = {name: ranks.train_one(name, folder / "one" / name) for name in CASES}
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert (folder / "two" / SCENARIOS[-1] / "rank-1.json").exists(), output[-4000:]
    return folder / "two", one


@pytest.fixture
def of_processes(trained):
    """f(scenario): what both processes found."""
    return lambda name: [json.loads((trained[0] / name / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_update_of_one(trained, name):
    folder, one = trained
    _, wrong = two_processes.verdict(name, folder, one[name])
    assert not wrong


def test_processes_write_one_file_by_parts(of_processes):
    for found in of_processes("keyed parts"):
        assert found == {"found": {"00": [0, 0], "01": [1, 1], "62": [7]}, "files": ["all", "one"]}


def test_reference_log_probs_are_computed_once_and_shared(of_processes, tmp_path):
    one, two = of_processes("shared reference")
    assert one["scored"] and two["scored"] and one["scored"] + two["scored"] == len(scenarios.MANY)
    alone = ranks.make_trainer(ranks.Case(), tmp_path, rows=scenarios.MANY)
    assert one["column"] == two["column"] == str(alone.train_dataset["ref_logprobs"][:])
    assert one["files"] == two["files"] == 1


def test_held_out_metrics_are_those_of_one_process(of_processes, tmp_path, monkeypatch):
    """The rows that accelerate repeats do not count, and an evaluation before training leaves DDP in place."""
    make = scenarios.make_trainer
    monkeypatch.setattr(scenarios, "make_trainer", lambda case, *args, **given: make(case, *args, **case.one | given))
    alone = scenarios.evaluation(tmp_path, 0)
    for found in of_processes("evaluation"):
        for name, expected in alone.items():
            for metric, value in expected.items():
                if "time" not in metric and "per_second" not in metric:
                    assert math.isclose(found[name][metric], value, rel_tol=1e-5, abs_tol=1e-6), (name, metric)


def test_a_loss_that_is_not_finite_in_one_process_stops_both(of_processes):
    one, two = of_processes("not finite")
    assert one["said"] == two["said"] and "Step 2: the loss is not finite (NaN or inf) on 2 rows" in one["said"]
    assert len(one["rows"]) == 2 and one["steps"] == two["steps"] == 1
    assert one["digest"] == two["digest"] and math.isfinite(one["digest"])


def test_a_signal_in_one_process_stops_both_and_both_go_on_to_the_same_bits(of_processes):
    one, two = of_processes("signals")
    assert one == two and len(one) == len(scenarios.STOPPED)
    for name, found in one.items():
        step = 3 if name.endswith("end") else 2
        assert found == [143, step, ["checkpoint-2", "checkpoint-3"], True, True], name


def test_a_sharded_model_is_saved_gathered_and_goes_on(of_processes):
    for rank, found in enumerate(of_processes("sharded")):
        assert found["before"] == [pytest.approx(math.log(2)), 0.0]  # evaluated before the model was sharded
        assert set(found["files"]) == {".json", ".safetensors"}
        assert found["same"] == [True, True]
        assert found["saved"] == (20 if rank == 0 else 0)  # tensors that are those of the sharded model
        assert "KLToStart cannot be combined with FSDP" in found["dpo, KL"]
        assert "Distillation cannot be combined with FSDP" in found["distillation, live"]
        assert "an adapter is trained, which is not supported" in found["dpo, LoRA"]
        assert "the loss (aot, kto or bco) compares rows" in found["kto"]
        assert "reward models are saved by one process as a whole" in found["reward"]
        assert "runs in one process, and 2 were started" in found["online"]


def test_another_number_of_processes_cannot_go_on(trained, of_processes):
    one, two = of_processes("other count")
    assert one == two and "was saved by 1 process, and now there are 2" in one
    place = trained[0] / "other count"
    alone = ranks.make_trainer(ranks.CASES["sft, LoRA"], place, resume_from_checkpoint="last", save_strategy="steps")
    with pytest.raises(ConfigError, match="was saved by 2 processes, and now there is 1, which would train on other"):
        alone.train()


def test_a_process_that_fails_alone_stops_the_other_with_a_sentence(of_processes):
    one, two = of_processes("one fails")
    assert "Step 2: memory ran out" in two["said"] and "several processes wait for each other" in two["said"]
    assert "Another process stopped or did not answer at step 2, so process 0 stops too" in one["said"]
    assert one["steps"] == two["steps"] == 1
