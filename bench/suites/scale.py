"""Suite `scale`: how time grows with N, V, T, the batch and the share of the prompt, on 1 and 2 threads of a CPU.

Each case is one curve:

- `n`, `v`: `linear_logprobs` with a frozen head, forward and backward
- `t`: forward and backward of a LoRA step on SmolLM2-135M-Instruct, with one pair of longer and longer completions
- `batch`: the same step with more and more pairs
- `prompt`: the same step with one pair of constant length, of which a larger and larger share is prompt
- `start`: from the start of a process to the first step of `orpo`, with more and more pairs of 680 tokens, and a second
  time with the tokens of the first start; its memory is the peak of all processes together (see `start.py`)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from bench.harness.measure import Checked, Measurement, WrongResult, environment, interleaved, quartiles, say
from bench.harness.suite import by_name
from bench.suites import ops, start
from bench.suites.train import LORA, MODEL
from fastalign.data.packing import PackedBatch, pack

POINTS = {
    "n": (128, 256, 512, 1024, 2048),
    "v": (8192, 16384, 32768, 65536, 131072),
    "t": (64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8),
    "prompt": (0, 25, 50, 75, 90),
    "start": (5_000, 20_000, 200_000),
}
WIDTH, TOKENS, VOCABULARY = 576, 512, 49152  # H, N of the curve over V, V of the curve over N
PAIR = (120, 40)  # tokens of the prompt and of each completion, on the curve over the batch
THREADS = (1, 2)
QUICK_POINTS = 2
# Largest difference of log-probs (nats) and of the gradient (relative to its largest entry) from the model's logits.
# It is not 0 because a packed and an unpacked row add up their terms in different orders, in 30 layers.
AGREE = 1e-3
IMPLEMENTATIONS = ("fastalign",)


@dataclass(frozen=True)
class Case:
    """One curve. With `quick` it has its first `QUICK_POINTS` points only."""

    axis: str
    threads: int
    quick: bool = False

    @property
    def name(self) -> str:
        """The name in records and on the command line."""
        threads = f"{self.threads}-thread{'s' if self.threads > 1 else ''}"
        return f"{self.axis}-{threads}{'-quick' if self.quick else ''}"

    @property
    def points(self) -> tuple[int, ...]:
        """The values along the axis."""
        return POINTS[self.axis][: QUICK_POINTS if self.quick else None]


CASES = by_name(Case(*parts) for parts in product(POINTS, THREADS))
QUICK = by_name([Case("n", 1, quick=True), Case("v", 1, quick=True)])


def run(case_name: str, rounds: int, limit_s: float) -> list[Measurement]:
    """Checks every point, times all points interleaved, and returns one record per point.

    `limit_s` is not used, because all runs are short.
    """
    del limit_s
    case = (CASES | QUICK)[case_name]
    torch.set_num_threads(case.threads)
    points = case.points
    if case.axis == "start":
        return [record for rows in points for record in _starts(case_name, rows, case.threads)]
    make = _op if case.axis in ("n", "v") else _step
    runs, checked = {}, {}
    for point in points:
        say(f"    checking {case.axis} = {point}", same_line=True)
        runs[str(point)], checked[point] = make(case.axis, point)
    load_before = os.getloadavg()[0]
    seconds = interleaved(runs, rounds)
    about = environment()
    measured = []
    for point in points:
        q1, median, q3 = quartiles(seconds[str(point)])
        done = checked[point]
        measured.append(Measurement(
            "scale", case_name, {case.axis: point}, f"{case.axis} = {point}", median, q1, q3, rounds, None,
            done.errors, done.scope, load=round(load_before, 2), **about,
        ))  # fmt: skip
    return measured


def _starts(case_name: str, rows: int, cores: int) -> list[Measurement]:
    """The first and the second start with some rows, each once: the first one takes minutes with many rows."""
    about, load_before, measured = environment(), os.getloadavg()[0], []
    for name, found in zip(("first", "second"), start.check(rows, cores), strict=True):
        say(f"    {name} start, {rows:,} rows: {found.seconds:.1f} s, {found.cpu_seconds:.1f} s of processors, "
            f"{found.peak_bytes / 1e9:.2f} GB in all processes")  # fmt: skip
        measured.append(Measurement(
            "scale", case_name, {"rows": rows}, f"{name} start, {rows:,} rows", *[found.seconds] * 3, 1,
            found.peak_bytes, {"rows": float(abs(found.rows - rows))}, "all rows are trained on",
            load=round(load_before, 2), **about,
        ))  # fmt: skip
    return measured


def _op(axis: str, point: int) -> tuple[Callable, Checked]:
    n, v = (point, VOCABULARY) if axis == "n" else (TOKENS, point)
    inputs = ops.make_inputs(ops.Case("frozen", "float32", n, WIDTH, v, 0))
    compute = ops.candidate("fastalign cpu", "frozen", inputs)
    return compute, ops.Truth("frozen", inputs).check("fastalign cpu", compute())


def _rows(axis: str, point: int) -> list[dict]:
    """The rows of one point: one or more pairs of random tokens."""
    if axis == "t":
        shapes = [(PAIR[0], point)]
    elif axis == "batch":
        shapes = [PAIR] * point
    else:
        whole = PAIR[0] + 2 * PAIR[1]
        shapes = [(whole * point // 100, (whole - whole * point // 100) // 2)]
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(1000, 40000, (count,), generator=generator).tolist()

    return [{"prompt_ids": tokens(p), "completion_ids": [tokens(c), tokens(c)]} for p, c in shapes]


def _step(axis: str, point: int) -> tuple[Callable, Checked]:
    model, rows = _model(), _rows(axis, point)
    batch = pack(rows)

    def compute() -> Tensor:
        logprobs = model(packed=batch).logprobs
        logprobs.sum().backward()
        return logprobs.detach()

    def timed() -> Tensor:
        logprobs = compute()
        model.zero_grad()
        return logprobs

    logprobs, grads, own, own_grads = compute(), _gradient(model), _own(model, rows, batch), _gradient(model)
    errors = {
        "logprobs": (logprobs - own).abs().max().item(),
        "gradient": ((grads - own_grads).abs().max() / own_grads.abs().max()).item(),
    }
    if not max(errors.values()) <= AGREE or any(map(math.isnan, errors.values())):
        raise WrongResult(f"log-probs and gradient are off by {errors} from the model's own logits")
    return timed, Checked(errors, "all log-probs and the adapters' gradient, against the model's own logits")


def _gradient(model) -> Tensor:
    """The gradient of all adapters as one vector. Afterwards the model has no gradient."""
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return grads


def _own(model, rows: list[dict], batch: PackedBatch) -> Tensor:
    """Log-probs of the scored tokens from the logits of ordinary calls of the model, with a backward pass each."""
    completions = [(row["prompt_ids"], completion) for row in rows for completion in row["completion_ids"]]
    found = []
    for (prompt, completion), scored in zip(completions, batch.cu_seqlens.diff().tolist(), strict=True):
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0, -scored - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, ids[0, -scored:, None]).squeeze(1))
        found[-1].sum().backward()
    return torch.cat(found).detach()


@cache
def _model():
    from peft import LoraConfig, get_peft_model

    from fastalign.models.loading import load_model
    from fastalign.models.scoring import prepare

    torch.manual_seed(0)
    model = get_peft_model(load_model(MODEL, dtype="float32"), LoraConfig(task_type="CAUSAL_LM", **LORA))
    prepare(model)
    return model
