"""What two processes do beside an undisturbed run: they share, evaluate, stop, fail and go on together.

Each function runs in both processes and returns what the test compares, as JSON has it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from ranks import CASES, Case, make_trainer, weights_of
from safetensors.torch import load_file
from soak import PAIRS, byte_tokenizer, tiny_model
from transformers import TrainerCallback

from fastalign import OnlineConfig, OnlineTrainer
from fastalign.data.keyed_parts import write_parts
from fastalign.data.processes import wait_for_all
from fastalign.errors import FastAlignError
from fastalign.files import KeyedTensors, read_jsonl
from fastalign.training.manifest import write_manifest

MANY = [{**row, "prompt": f"{row['prompt']} {i}"} for i in range(9) for row in PAIRS]


def digest(trainer: Any) -> float:
    """A number that shows whether two processes have the same weights."""
    return sum(value.double().sum().item() for value in weights_of(trainer).values())


def logged(trainer: Any) -> list[dict]:
    """The lines of training that were logged, without what a clock says."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gb")} for line in lines]


def keyed_parts(folder: Path, rank: int) -> Any:
    """Both processes write one file; one key is in both parts."""
    import numpy as np

    keys = [bytes([rank]) * 16, b"both" * 4]
    write_parts(folder / "all", keys, {"x": [np.full(2, rank), np.full(1, 7)]}, {"of": "test"})
    stored = KeyedTensors(folder / "all", ["x"])
    write_parts(folder / "one", keys if rank else [], {"x": [np.full(2, rank), np.full(1, 7)] if rank else []})
    found = {key.hex()[:2]: values.tolist() for key, values in stored.read_all("x").items()}
    return {"found": found, "files": sorted(path.name for path in folder.glob("[.ao]*") if path.suffix != ".json")}


def shared_reference(folder: Path, rank: int) -> Any:
    """Each process scores a part of the rows, and both have the log-probs of all."""
    trainer = make_trainer(Case(), folder, rows=MANY)
    column = trainer.train_dataset["ref_logprobs"][:]
    scored = [0]
    score = trainer._score_rows

    def counted(rows):
        scored[0] += len(rows)
        return score(rows)

    trainer.args.ref_cache_dir = str(folder / "other")
    trainer._precompute(trainer.train_dataset.remove_columns("ref_logprobs"), counted)
    files = [path.name for path in (folder / "cache").rglob("*") if path.is_file()]
    return {"scored": scored[0], "column": str(column), "files": len(files)}


def evaluation(folder: Path, rank: int, names: tuple[str, ...] = ("dpo, LoRA", "kto")) -> Any:
    """Seven held-out rows, of which the second process has no whole last batch."""
    numbers = {}
    for name in names:
        trainer = make_trainer(CASES[name], folder / name, held_out=7, per_device_eval_batch_size=2)
        numbers[name] = trainer.evaluate()
        trainer.train()
        numbers[f"{name}, trained"] = trainer.evaluate()
    return numbers


class NaN:
    """A regulariser whose term is NaN at the second step of the second process."""

    def start(self, trainer: Any) -> Any:
        """The term."""

        def term(step):
            bad = trainer.state.global_step == 1 and trainer.args.process_index == 1
            return step.loss * float("nan") if bad else step.loss.new_zeros(()), {}

        return term


def not_finite(folder: Path, rank: int) -> Any:
    """A loss that is NaN in one process stops both, with the weights of the step before."""
    trainer = make_trainer(Case("sft", "completions", regularizers=lambda: [NaN()]), folder)
    try:
        trainer.train()
    except FastAlignError as error:
        said = str(error)
    else:
        said = "nothing"
    rows = [row["prompt"] for row in read_jsonl(folder / "run" / "nonfinite_rows.jsonl")] if rank == 0 else []
    return {"said": said, "rows": rows, "steps": trainer.state.global_step, "digest": digest(trainer)}


class Kill(TrainerCallback):
    """Sends SIGTERM to one process."""

    def __init__(self, when: str, step: int, process: int = 1):
        self.when, self.step, self.process = when, step, process

    def _kill(self, when: str, args: Any, state: Any) -> None:
        if (when, state.global_step, args.process_index) == (self.when, self.step, self.process):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_begin(self, args, state, control, **kwargs):
        """A signal while a step runs."""
        self._kill("step", args, state)

    def on_step_end(self, args, state, control, **kwargs):
        """A signal in the last step of an epoch, after the processes have agreed that there was none."""
        self._kill("epoch", args, state)

    def on_train_end(self, args, state, control, **kwargs):
        """A signal after the last step."""
        self._kill("end", args, state)


# When the signal comes: in the second step, after the processes agreed at the end of the second, or after the last one.
MOMENTS = {"step": 1, "epoch": 2, "end": 3}
STOPPED = {"bco": ("epoch",), "dpo, EWC + KL + replay": ("step",)}
STOPPED_ALWAYS = {
    name: tuple(MOMENTS)
    for name in ("sft, LoRA", *STOPPED, "dpo, stored reference", "dpo, moving reference", "kto", "orpo",
                 "distillation, stored", "distillation, live", "distillation from the start", "sft, layer-wise")
}  # fmt: skip


def stopped(folder: Path, cases: dict[str, tuple[str, ...]]) -> Any:
    """SIGTERM in one process stops both after the same step, and both go on to the bits of a run that never stopped."""
    found = {}
    saving = {
        "save_strategy": "steps", "save_steps": 2, "logging_steps": 2, "lora_dropout": 0.2, "held_out": 3,
        "eval_strategy": "epoch",
    }  # fmt: skip
    for name, moments in cases.items():
        whole = make_trainer(CASES[name], folder / name / "whole", **saving)
        whole.train()
        for moment in moments:
            place = folder / name / moment
            trainer = make_trainer(CASES[name], place, **saving)
            trainer.add_callback(Kill(moment, MOMENTS[moment]))
            status: Any = "not stopped"
            try:
                trainer.train()
            except SystemExit as stop:
                status = stop.code
            again = make_trainer(CASES[name], place, **saving, resume_from_checkpoint="last")
            again.train()
            checkpoints = sorted(path.name for path in (place / "run").glob("*checkpoint*"))
            same = digest(again) == digest(whole), logged(again) == logged(whole)
            found[f"{name}, {moment}"] = [status, trainer.state.global_step, checkpoints, *same]
    return found


def sharded(folder: Path, rank: int) -> Any:
    """FSDP2: a run that stops and goes on, what it saves, and what is refused."""
    case, found = CASES["fsdp, dpo, live reference"], {}
    saving = {"save_strategy": "steps", "save_steps": 1, "held_out": 3, "eval_strategy": "epoch", "fsdp": True}
    saving |= {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0}
    whole = make_trainer(case, folder / "whole", **saving)
    before = whole.evaluate()
    whole.train()
    found["before"] = [before["eval_loss"], before["eval_kl"]]
    found["weights"] = weights_of(whole)
    make_trainer(case, folder / "again", **saving, num_train_epochs=1, max_steps=2).train()
    for path in (folder / "again" / "run").glob("checkpoint-*"):
        found.setdefault("files", sorted(file.suffix for file in path.iterdir()))
    wait_for_all()
    again = make_trainer(case, folder / "again", **saving, resume_from_checkpoint="last")
    again.train()
    found["same"] = digest(again) == digest(whole), logged(again)[-1] == logged(whole)[-1]
    weights = found.pop("weights")
    saved = load_file(folder / "whole" / "run" / "checkpoint-3" / "model.safetensors") if rank == 0 else {}
    found["saved"] = all(torch.equal(value, weights[name]) for name, value in saved.items()) and len(saved)
    for name in ("dpo, KL", "distillation, live", "dpo, LoRA", "kto", "reward"):
        found[name] = refusal(CASES[name], folder / name, fsdp=True)
    found["online"] = online_refusal(folder / "online")
    return found


def refusal(case: Case, folder: Path, **options: Any) -> str:
    """Why a trainer is refused."""
    try:
        make_trainer(case, folder, **options)
    except FastAlignError as error:
        return str(error)
    return "nothing"


def online_refusal(folder: Path) -> str:
    """Why learning from rewards is refused in several processes."""
    args = OnlineConfig(output_dir=str(folder), use_cpu=True, num_generations=2, per_device_train_batch_size=2)
    try:
        OnlineTrainer(tiny_model(), args, PAIRS, processing_class=byte_tokenizer(), reward_funcs=_no_reward)
    except FastAlignError as error:
        return str(error)
    return "nothing"


def _no_reward(prompts: list, **_: Any) -> list[float]:
    return [0.0] * len(prompts)


def other_count(folder: Path, rank: int) -> Any:
    """A checkpoint of one process cannot be gone on from in two; one of two is left for a single process to try."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(CASES["sft, LoRA"], folder, **saving).train()
    if rank == 0:
        one = folder / "one" / "run" / "checkpoint-1"
        shutil.copytree(folder / "run" / "checkpoint-1", one)
        for path in one.glob("process-1.*"):
            path.unlink()
        (one / "manifest.json").unlink()
        write_manifest(one, 1)
    wait_for_all()
    again = make_trainer(
        CASES["sft, LoRA"], folder / "one", **{**saving, "max_steps": 2}, resume_from_checkpoint="last"
    )
    try:
        again.train()
    except FastAlignError as error:
        return str(error)
    return "nothing"


class Fails:
    """A regulariser that runs out of memory at the second step of the second process."""

    def start(self, trainer: Any) -> Any:
        """The term."""

        def term(step):
            if trainer.state.global_step == 1 and trainer.args.process_index == 1:
                raise MemoryError
            return step.loss.new_zeros(()), {}

        return term


def one_fails(folder: Path, rank: int) -> Any:
    """An error in one process alone stops the other too, with a sentence. The process that failed has to end."""
    trainer = make_trainer(Case("sft", "completions", regularizers=lambda: [Fails()]), folder)
    said = "nothing"
    try:
        trainer.train()
    except FastAlignError as error:
        said = str(error)
    (folder / f"rank-{rank}.json").write_text(json.dumps({"said": said, "steps": trainer.state.global_step}))
    os._exit(1)  # as after an error that nothing catches; the last scenario of its group


SCENARIOS = {
    "keyed parts": keyed_parts,
    "shared reference": shared_reference,
    "evaluation": evaluation,
    "not finite": not_finite,
    "signals": lambda folder, rank: stopped(folder, STOPPED),
    "sharded": sharded,
    "other count": other_count,
    "one fails": one_fails,
    "all evaluations": lambda folder, rank: evaluation(
        folder, rank, ("sft", "dpo, LoRA", "kto", "dpo, stored reference")
    ),
    "all signals": lambda folder, rank: stopped(folder, STOPPED_ALWAYS),
}
