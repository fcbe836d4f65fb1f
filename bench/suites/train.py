"""Suite `train`: DPO steps on SmolLM2-135M-Instruct beside TRL's DPOTrainer, on the same rows in the same order.

Each run is a separate process that loads the model, tokenises, and trains a few steps of `PAIRS` pairs. Runs of the
implementations alternate (A B A B ...).

fastalign computes all reference log-probs before the first step. Each of its steps is charged an equal share of that
time, as if the rows were used for one epoch only. TRL computes them within each step.

Both loss curves must agree. In float32 they are compared with each other. In bfloat16 their distance from float32 must
be within what rounding explains (see bench/harness/rounding.py).
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch

from bench.harness import machine, rounding
from bench.harness.measure import (
    ROOT,
    Measurement,
    Missing,
    environment,
    peak_resident,
    quartiles,
    say,
    synchronize,
)
from bench.harness.suite import by_name

MODEL = "smollm2-135m-instruct"
PAIRS = 4  # per step
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LEARNING_RATE = {"lora": 1e-4, "full": 1e-6}
BETA = 0.1
# profile -> (least, mean, most) tokens of prompts, the same of completions
PROFILES = {"dialogue": ((20, 120, 400), (10, 40, 200)), "long": ((400, 800, 1500), (10, 40, 200))}
AGREE = 1e-4  # how far a correct float32 loss may be from the other trainer's loss
IMPLEMENTATIONS = ("fastalign", "TRL", "TRL, no checkpointing")


def multiplies_bfloat16() -> bool:
    """Whether this machine has instructions for bfloat16 products."""
    return torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()


@dataclass(frozen=True)
class Case:
    """A case: `tuning` is "lora" or "full". `dtype` is that of the frozen weights (lora) or of autocast (full)."""

    tuning: str
    dtype: str
    profile: str

    @property
    def name(self) -> str:
        """The name in records and on the command line."""
        return f"{self.tuning}-{self.dtype}-{self.profile}"

    @property
    def steps(self) -> int:
        """How many steps a run has. The first one warms up and is not timed."""
        if self.dtype == "bfloat16" and not multiplies_bfloat16():
            return 2  # on a CPU without bfloat16 instructions one step of TRL takes minutes
        return 5 if self.profile == "dialogue" else 3


CASES = by_name(Case(*parts) for parts in product(("lora", "full"), ("float32", "bfloat16"), PROFILES))
QUICK = {"lora-float32-dialogue": CASES["lora-float32-dialogue"]}


@dataclass
class Run:
    """What the process of one run reports.

    Attributes:
        step_s: seconds of each step.
        losses: loss of each step.
        reference_s: seconds that the reference log-probs of all rows took before training.
        tokens: useful tokens of all rows: each prompt once, and the completions.
        scored: completion tokens of all rows.
        flop: floating-point operations per step that cannot be avoided, those of the reference included.
        peak_bytes: peak resident set of the process while training.
        extra_bytes: the same, minus what was resident after model and rows were loaded.
        gradient: the gradient of the first step, as `rounding.sketch` summarises it.
    """

    step_s: list[float]
    losses: list[float]
    reference_s: float
    tokens: int
    scored: int
    flop: int
    peak_bytes: int
    extra_bytes: int
    gradient: list[float]


# Rows


def rows(profile: str, tokenizer, count: int) -> list[dict[str, str]]:
    """Seeded preference rows whose token counts follow the profile. Every word of them is one token."""
    draw = random.Random(profile)
    words = sorted(w[1:] for w in tokenizer.get_vocab() if w[0] == "Ġ" and w[1:].isascii() and w[1:].isalpha())
    of_prompts, of_completions = PROFILES[profile]
    prompts = lengths(draw, count, *of_prompts)
    completions = lengths(draw, 2 * count, *of_completions)

    def text(length: int) -> str:
        return "".join(f" {draw.choice(words)}" for _ in range(length))

    return [
        {"prompt": text(prompts[i]), "chosen": text(completions[2 * i]), "rejected": text(completions[2 * i + 1])}
        for i in range(count)
    ]


def lengths(draw: random.Random, count: int, least: int, mean: int, most: int) -> list[int]:
    """`count` lengths in random order: many short ones and a few long ones.

    They are quantiles of an exponential distribution that begins at `least` and is cut at `most`, scaled until their
    mean is right. Quantiles instead of random draws give a few rows the same profile as many rows.
    """
    spread = mean - least
    for _ in range(50):
        drawn = [min(most, round(least - spread * math.log(1 - (i + 0.5) / count))) for i in range(count)]
        spread *= (mean - least) / max(1e-9, statistics.mean(drawn) - least)
    draw.shuffle(drawn)
    return drawn


# The runs, each in a separate process


def _clock(seconds: list[float]):
    """A callback that appends the seconds of each step. A step begins where the last one ended, collation included."""
    # Imported here because it takes seconds, and every process that measures the memory of an op imports this module.
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.end = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            synchronize()
            start, self.end = self.end, time.perf_counter()
            seconds.append(self.end - start)

    return Clock()


def _options(case: Case, folder: str, checkpointing: bool) -> dict:
    """The options that the configs of both trainers share."""
    return {
        "output_dir": folder, "per_device_train_batch_size": PAIRS, "num_train_epochs": 1, "beta": BETA, "seed": 1,
        "learning_rate": LEARNING_RATE[case.tuning], "lr_scheduler_type": "constant", "logging_steps": 1,
        "max_length": None, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": checkpointing, "bf16": case.tuning == "full" and case.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),  # without it transformers refuses bf16 on a CPU
    }  # fmt: skip


def _fastalign(case: Case, model, tokenizer, data, folder: str):
    from fastalign import PreferenceConfig, PreferenceTrainer

    class Timed(PreferenceTrainer):
        def _prepare_reference(self):
            start = time.perf_counter()
            reference = super()._prepare_reference()
            self.reference_s = time.perf_counter() - start
            return reference

    config = PreferenceConfig(**_options(case, folder, False), ref_cache_dir=folder)
    return Timed(model, config, data, processing_class=tokenizer, peft_config=_lora(case))


def _trl(case: Case, model, tokenizer, data, folder: str, checkpointing: bool):
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise Missing(f"{error}; pip install 'fastalign[bench]'") from error
    from datasets import Dataset

    # bf16 is TRL's default; in the float32 cases it is switched off.
    options = _options(case, folder, checkpointing) | {"bf16": case.dtype == "bfloat16"}
    config = DPOConfig(**options)
    # With LoRA, TRL switches the adapter off to get the reference. Without LoRA it would load the reference by the
    # model's name, but a model from a GGUF file has none.
    reference = copy.deepcopy(model) if case.tuning == "full" else None
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=config, train_dataset=Dataset.from_list(data),
        processing_class=tokenizer, peft_config=_lora(case),
    )  # fmt: skip
    trainer.reference_s = 0.0
    return trainer


def _lora(case: Case):
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **LORA) if case.tuning == "lora" else None


def train(case_name: str, implementation: str) -> Run:
    """One run, in this process, which must be a fresh one. `implementation` is one of `IMPLEMENTATIONS` or a twin."""
    from fastalign.models.loading import load_model, load_tokenizer

    case = CASES[case_name]
    draw = case.tuning == "full" and case.dtype == "bfloat16"
    if implementation == rounding.FLOAT32:
        case = replace(case, dtype="float32")
    tokenizer = load_tokenizer(MODEL)
    model = load_model(MODEL, dtype=case.dtype if case.tuning == "lora" else "float32")
    rounding.change(model, implementation, draw)
    data = rows(case.profile, tokenizer, PAIRS * case.steps)
    step_s, losses, gradient = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        resident = peak_resident(reset=True)
        if implementation.startswith("fastalign"):
            trainer = _fastalign(case, model, tokenizer, data, folder)
        else:
            trainer = _trl(case, model, tokenizer, data, folder, checkpointing="no checkpointing" not in implementation)
        trainer.add_callback(_clock(step_s))
        step = trainer.training_step

        def kept(model, *args, **kwargs):
            losses.append((loss := step(model, *args, **kwargs)).item())
            gradient[:] = gradient or rounding.sketch(trainer.accelerator.unwrap_model(model))
            return loss

        trainer.training_step = kept
        trainer.train()
    tokens, scored = _useful_tokens(data, tokenizer)
    peak = peak_resident()
    flop = _flop(model, tokens, scored, case.tuning) // case.steps
    return Run(step_s, losses, trainer.reference_s, tokens, scored, flop, peak, peak - resident, gradient)


def _flop(model, tokens: int, scored: int, tuning: str) -> int:
    """FLOP of the matrix products of policy and reference: the body over all tokens, the head over completion tokens.

    The backward pass of a frozen layer is one product, that of a trained layer two. Attention and adapters are not
    counted.
    """
    head = model.get_output_embeddings().weight.numel()
    body = sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if type(m) is torch.nn.Linear and "lora_" not in name and "lm_head" not in name
    )
    passes = 1 + 1 + (1 if tuning == "lora" else 2)  # reference forward, policy forward, policy backward
    return 2 * passes * (tokens * body + scored * head)


def _useful_tokens(data: list[dict[str, str]], tokenizer) -> tuple[int, int]:
    """(prompts once plus completions, completions) in tokens. A completion has one more token, which ends it."""
    prompts = sum(len(tokenizer(row["prompt"])["input_ids"]) for row in data)
    completions = sum(len(tokenizer(row[side])["input_ids"]) + 1 for row in data for side in ("chosen", "rejected"))
    return prompts + completions, completions


def in_fresh_process(case: str, implementation: str) -> Run:
    """One run by `python -m bench train-run ...`. Raises Missing, with the reason, if it failed."""
    threads = ["--threads", str(torch.get_num_threads())]
    command = [sys.executable, "-m", "bench", "train-run", case, implementation, *threads]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1])
    return Run(**json.loads(done.stdout.splitlines()[-1]))


# The suite


def run(case_name: str, rounds: int, limit_s: float) -> list[Measurement]:
    """Runs the implementations alternately, compares their loss curves, and returns one record each.

    An implementation with a step longer than `limit_s` seconds gets one round only. There are `rounds // 3` rounds, at
    least one.
    """
    runs: dict[str, list[Run]] = {}
    skipped: dict[str, str] = {}
    slow: set[str] = set()
    load_before, rate = os.getloadavg()[0], _gemm_rate(case_name, limit_s)
    for number in range(max(1, rounds // 3)):
        for name in IMPLEMENTATIONS:
            if name in skipped or name in slow:
                continue
            say(f"    round {number + 1}: {name}", same_line=True)
            try:
                done = in_fresh_process(case_name, name)
            except Missing as reason:
                skipped[name] = str(reason)
                say(f"    skipped {name}: {reason}")
                continue
            runs.setdefault(name, []).append(done)
            if statistics.median(done.step_s[1:]) > limit_s:
                slow.add(name)
                say(f"    {name} gets one round only: a step takes more than {limit_s:.0f} s (--limit)")
    rate = max(rate, _gemm_rate(case_name, limit_s))
    twins = _twins(case_name)
    for name, done in runs.items():
        say(f"    {name}: losses {_curve(done[0].losses)}")
    records = [_measurement(case_name, name, runs, twins, load_before, rate) for name in runs]
    skipped = {name: reason for name, reason in skipped.items() if name not in runs}
    return [replace(record, skipped=skipped) for record in records]


def _gemm_rate(case_name: str, limit_s: float) -> int:
    """FLOP per second of the best bare product. It is float32 if the machine has no bfloat16 instructions."""
    dtype = CASES[case_name].dtype if multiplies_bfloat16() else "float32"
    products = machine.run(f"product-{dtype}", 5, limit_s)
    return round(max(product.sizes["flop"] / product.median_s for product in products))


def _twins(case_name: str) -> dict[str, Run]:
    """The runs that show how much rounding changes (see `rounding`). In float32 there are none."""
    case = CASES[case_name]
    if case.dtype == "float32":
        return {}
    found = {}
    for twin in rounding.twins(case.tuning, multiplies_bfloat16()):
        try:
            found[twin] = in_fresh_process(case_name, twin)
        except Missing as reason:
            raise SystemExit(f"a run that the others are compared with failed, {twin}: {reason}") from reason
        say(f"    {twin}: losses {_curve(found[twin].losses)}")
    return found


def _apart(name: str, runs: dict[str, list[Run]]) -> float:
    """The largest difference, in any round and step, of these losses from those of the other system."""
    theirs = [n for n in runs if (n == "fastalign") != (name == "fastalign")]
    if not theirs:
        raise SystemExit(
            f"there is nothing to compare the losses of {name} with: run fastalign and another one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    curves = [(own.losses, other.losses) for own in runs[name] for n in theirs for other in runs[n]]
    apart = [abs(a - b) for ours, others in curves for a, b in zip(ours, others, strict=True)]
    return math.nan if any(map(math.isnan, apart)) else max(apart)


def _curve(losses: list[float]) -> str:
    return " ".join(f"{loss:.5f}" for loss in losses)


def _check(case: Case, name: str, runs: dict[str, list[Run]], twins: dict[str, Run]) -> tuple[dict[str, float], str]:
    """How far the losses (and in bfloat16 the gradient) are off, and what they were compared with.

    Raises:
        SystemExit: they are further off than the precision explains.
    """
    if twins:
        rounds = [rounding.distances(run, twins[rounding.FLOAT32]) for run in runs[name]]
        off = {what: max((r[what] for r in rounds), key=lambda x: (math.isnan(x), x)) for what in rounds[0]}
        peers = [run for n, done in runs.items() if n != "fastalign" for run in done]
        allowed = rounding.allowed(twins, peers if name == "fastalign" else None)
        checked = f"{case.steps} losses and a gradient against float32's, by what other rounding changes"
    else:
        off, allowed, checked = (
            {"loss": _apart(name, runs)},
            {"loss": AGREE},
            f"{case.steps} losses against the other trainer's",
        )
    for what, distance in off.items():
        if not distance <= allowed[what]:
            raise SystemExit(
                f"{name} on {case.name}: its {what} differs by {distance:.2g}, more than the {allowed[what]:.2g} that "
                f"{case.dtype} explains; nothing was written"
            )
    return off, checked


def _measurement(
    case_name: str, name: str, runs: dict[str, list[Run]], twins: dict[str, Run], load_before: float, rate: int
) -> Measurement:
    case, done = CASES[case_name], runs[name]
    off, checked = _check(case, name, runs, twins)
    # The steps of a run have different numbers of tokens, so a run counts by the mean of its steps.
    seconds = [statistics.mean(r.step_s[1:]) + r.reference_s / case.steps for r in done]
    q1, median, q3 = quartiles(seconds)
    sizes = {
        "pairs": PAIRS,
        "tokens": done[0].tokens // case.steps,
        "scored": done[0].scored // case.steps,
        "reference_us": round(1e6 * statistics.median(r.reference_s for r in done) / case.steps),
        "flop": done[0].flop,
        "gemm_flop_per_s": rate,  # the higher one of two measurements, before and after the runs
        "resident_bytes": max(r.peak_bytes for r in done),
    }
    return Measurement(
        "train", case_name, sizes, name, median, q1, q3, len(seconds), max(r.extra_bytes for r in done),
        off, checked, load=round(load_before, 2), losses=done[0].losses, **environment(),
    )  # fmt: skip


def main(case: str, implementation: str) -> None:
    """Makes one run in this process, and prints it as JSON in the last line."""
    print(json.dumps(asdict(train(case, implementation))))
