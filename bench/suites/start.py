"""From the start of a process to its first step of training: the curve `start` of the suite `scale`.

The model is tiny and random, since loading one is not what is measured. Rows are pairs of 680 tokens. Memory is that of
all processes together: pages that several of them share count once (PSS, Linux only).

    python -m bench.suites.start FILE LOSS CACHE_FOLDER CORES     one start; prints JSON when the first step begins
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

PROMPT, COMPLETION = 180, 240  # tokens, the template's included
WORDS = 20_000  # of which texts are made
INTERVAL_S = 0.25  # between two readings of the memory
LOSS = "orpo"  # has no reference


class Start(NamedTuple):
    """One start: seconds of wall and of processors, peak bytes of all processes, and rows that are trained on."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    rows: int


def write_pairs(path: Path, rows: int, seed: int = 0) -> None:
    """Writes chat pairs of about 680 tokens by SmolLM2's tokenizer. As in a language, few words are frequent."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = [1 / (n + 2) for n in range(len(letters))]
    words = ["".join(draw.choices(letters, weights, k=draw.randint(2, 7))) for _ in range(WORDS)]
    frequent = list(accumulate(1 / (n + 5) for n in range(WORDS)))

    def text(tokens: int) -> str:
        return " ".join(
            draw.choices(words, cum_weights=frequent, k=round(tokens / 1.9))
        )  # SmolLM2 takes 1.9 tokens a word of these

    def turn(role: str, tokens: int) -> list[dict]:
        return [{"role": role, "content": text(tokens)}]

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            row = {"prompt": turn("user", PROMPT - 31)}
            row |= {name: turn("assistant", COMPLETION) for name in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")


def measure_start(path: Path, cache: Path, cores: int, loss: str = LOSS) -> Start:
    """Starts a process on some cores, and watches the memory of all its processes until its first step begins."""
    command = [sys.executable, "-m", "bench.suites.start", str(path), loss, str(cache), str(cores)]
    before = os.times()
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cores)},
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        peak = max(peak, proportional_bytes(process.pid))
        time.sleep(INTERVAL_S)
    seconds, after = time.monotonic() - started, os.times()
    told = process.communicate()[0].strip().splitlines()
    if process.returncode or not told:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Start(seconds - json.loads(told[-1])["model_seconds"], cpu, peak, json.loads(told[-1])["rows"])


def proportional_bytes(pid: int) -> int:
    """The memory of a process and all below it, where shared pages count once. 0 where /proc does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = [Path(task, "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:  # it has just ended
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return own + sum(proportional_bytes(int(child)) for some in children for child in some)


def check(rows: int, cores: int) -> tuple[Start, Start]:
    """A first start with some rows, and a second one, which finds the tokens on disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.jsonl")
        write_pairs(path, rows)
        return tuple(measure_start(path, Path(folder, "cache"), cores) for _ in range(2))


def main(path: str, loss: str, cache: str, cores: str) -> None:
    """Trains until the first step begins."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])

    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from fastalign import PreferenceConfig, PreferenceTrainer
    from fastalign.models.loading import load_tokenizer

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            print(json.dumps({"model_seconds": model_seconds, "rows": len(trainer.train_dataset)}), flush=True)
            os._exit(0)

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    began = time.monotonic()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes))
    model_seconds = time.monotonic() - began
    config = PreferenceConfig(
        output_dir=str(Path(cache, "run")), loss_type=loss, use_cpu=True, per_device_train_batch_size=4, max_steps=1,
        token_cache_dir=cache, ref_cache_dir=cache, overwrite_output_dir=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = PreferenceTrainer(model, config, path, None, tokenizer, callbacks=[Stop()])
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
