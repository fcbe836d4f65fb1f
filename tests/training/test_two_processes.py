"""Two processes that torchrun starts make the update of one: the short form of tests/soak/two_processes.py.

All cases run one after the other in one group of processes, because to start two of them takes as long as all cases.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "soak"))
import ranks
import two_processes

CASES = [
    "sft, LoRA", "sft, two micro-batches", "dpo, stored reference", "orpo", "kto", "bco", "distillation, stored",
    "dpo, EWC + KL + replay", "sft, layer-wise",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the runs of two processes, and what one process trained, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    process = two_processes.torchrun(folder / "two", CASES)
    try:
        one = {name: ranks.train_one(name, folder / "one" / name) for name in CASES}
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]
    return folder / "two", one


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_update_of_one(trained, name):
    folder, one = trained
    _, wrong = two_processes.verdict(name, folder, one[name])
    assert not wrong
