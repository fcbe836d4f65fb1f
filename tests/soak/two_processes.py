"""Trains every case in one process and in two, and compares the weights, the logged numbers and the processes.

    make soak
    python tests/soak/two_processes.py ["sft, LoRA" ...]

The script prints a table, and exits with 1 if an update differs by more than rounding.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import ranks

RELATIVE = 1e-6
# Logged numbers that are of this machine and moment, or of a sum over all rows that rounds otherwise.
CLOCKS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "tokens_per_second", "memory_gb",
          "total_flos", "epoch", "step"}  # fmt: skip


def torchrun(folder: Path, names: list[str], script: str = "ranks.py") -> subprocess.Popen:
    """Starts two processes that train the cases one after the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, str(Path(__file__).with_name(script)), str(folder), *names], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight, relative to the largest weight of its tensor; inf for different tensors."""
    if one.keys() != two.keys():
        return math.inf
    return max(((one[name] - two[name]).abs().max() / one[name].abs().max().clamp(min=1e-12)).item() for name in one)


def differing_numbers(one: list[dict], two: list[dict], relative: float = 1e-5) -> list[str]:
    """The logged numbers that differ, by name and step."""
    differing = [] if len(one) == len(two) else [f"{len(one)} lines and {len(two)}"]
    for left, right in zip(one, two, strict=False):
        for name in sorted((left.keys() | right.keys()) - CLOCKS):
            a, b = left.get(name, math.nan), right.get(name, math.nan)
            if not math.isclose(a, b, rel_tol=relative, abs_tol=1e-6):
                differing.append(f"{name} of step {left.get('step')}: {a} and {b}")
    return differing


def verdict(name: str, folder: Path, one: tuple[dict[str, torch.Tensor], list[dict]]) -> tuple[float, list[str]]:
    """How far the update of two processes is from that of one, and what is wrong with it."""
    two = load_file(folder / name / "weights.safetensors")
    records = [json.loads((folder / name / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    off, wrong = difference(one[0], two), []
    if off > (0.0 if ranks.CASES[name].exact else RELATIVE):
        wrong.append(f"weights differ by {off:.2g}")
    if not all(math.isfinite(value.sum().item()) for value in two.values()):
        wrong.append("weights are not finite")
    if records[0]["digest"] != records[1]["digest"]:
        wrong.append("the processes have different weights")
    return off, wrong + differing_numbers(one[1], records[0]["log"])


def main() -> int:
    """Runs the cases named on the command line, or all."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("fastalign").setLevel(logging.ERROR)
    names, bad = sys.argv[1:] or list(ranks.CASES), 0
    with tempfile.TemporaryDirectory(prefix="ranks-") as place:
        folder = Path(place)
        (folder / "two").mkdir()
        process = torchrun(folder / "two", names)
        one = {name: ranks.train_one(name, folder / "one" / name) for name in names}
        output, _ = process.communicate()
        if process.returncode:
            print(output)
        print(f"| {'case':<34} | largest difference |\n|{'-' * 36}|--------------------|")
        for name in names:
            if not (folder / "two" / name / "rank-1.json").exists():
                print(f"| {name:<34} | {'did not end':>18} |")
                bad += 1
                continue
            off, wrong = verdict(name, folder / "two", one[name])
            bad += bool(wrong)
            print(f"| {name:<34} | {'0, all bits equal' if off == 0 else format(off, '.1e'):>18} |")
            for sentence in wrong[:6]:
                print(f"    {sentence}")
    print(f"\n{bad} of {len(names)} cases differ")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
