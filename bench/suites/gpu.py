"""What a GPU is needed for, in ten minutes: each kernel against float64, then the suites' main cases, then report.html.

All kernels are checked, but ten minutes are too short to time everything. Timed are, in bfloat16: log-probs, forward
and with a frozen head, 0 and 50 % of the tokens prompt; the gather; DPO's loss; LoRA steps on dialogue. Left out are
float32, trainable heads, 80 % prompt, memory against the vocabulary, what torch.compile has to compile first, the other
losses, long prompts, tuning of all weights, divergences and Fisher information: `python -m bench SUITE` measures those,
on the GPU too. `scale` is of CPU threads.

Every step is a process of its own, so that a kernel that faults or hangs takes nothing else with it. A step may take
its share of the time, by the seconds planned, and what earlier steps left over; then it is ended, and what it had
measured is kept.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness import machine
from bench.harness.measure import ROOT, load
from bench.harness.suite import draw_head
from bench.suites import losses, ops, selective, train
from fastalign import reference
from fastalign.models.linear import LoraLinearGpu, speed_up_linear
from fastalign.ops.accumulate_fisher import BACKENDS as FISHER
from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.backends.pick import BACKENDS as DIVERGENCE
from fastalign.ops.backends.pick import BACKENDS as LINEAR
from fastalign.ops.ewc import BACKENDS as EWC
from fastalign.ops.ewc import ewc_penalty, ewc_penalty_
from fastalign.ops.linear_divergence import linear_divergence
from fastalign.ops.linear_logprobs import linear_logprobs
from fastalign.ops.preference_loss import preference_loss
from fastalign.ops.selective_logprobs import BACKENDS as SELECTIVE
from fastalign.ops.selective_logprobs import selective_logprobs

SECONDS = 600
REPORT_S = 30  # of them, for report.html
BACKENDS = ("torch", "triton", "cuda")
KINDS = ("frozen", "forward")  # of `ops`


class Step(NamedTuple):
    """One call of `python -m bench`."""

    command: str
    seconds: int
    cases: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def arguments(self, out: Path) -> list[str]:
        where = ["--case", *self.cases, *self.options, "--out", str(out)] if self.cases else []
        return [self.command, *where]


def plan() -> list[Step]:
    """The steps, the most important first, and about how long each takes."""

    def matching(suite, *patterns: str) -> tuple[str, ...]:
        return tuple(case for case in suite.CASES if any(fnmatch(case, pattern) for pattern in patterns))

    def of_shape(shape: tuple[int, int, int]) -> tuple[str, ...]:
        size = "x".join(map(str, shape))
        return matching(ops, *(f"{kind}-bfloat16-{size}-mask{mask}" for kind, mask in product(KINDS, (0, 50))))

    # torch.compile takes half a minute a case to compile: `python -m bench ops` has it.
    compared = ("--only", *(name for name in ops.IMPLEMENTATIONS if name not in ("torch.compile", "fastalign cpu")))
    return [
        Step("gpu-kernels", 60),
        Step("train", 110, matching(train, "lora-bfloat16-dialogue"), ("--only", "fastalign", "TRL", "--rounds", "1")),
        Step("machine", 15, tuple(machine.CASES)),
        *(Step("ops", s, of_shape(shape), compared) for shape, s in zip(ops.SHAPES, (35, 40, 55), strict=True)),
        Step("selective", 25, matching(selective, "*-bfloat16-*")),
        Step("losses", 45, matching(losses, "dpo-*-bfloat16-*")),
    ]


def stretched(steps: list[Step], seconds: int) -> list[Step]:
    """The steps, with all the seconds that there are beside the report's dealt out by what each has planned."""
    planned = sum(step.seconds for step in steps)
    return [step._replace(seconds=step.seconds * (seconds - REPORT_S) // planned) for step in steps]


def fitting(steps: list[Step], seconds: int) -> tuple[list[Step], list[Step]]:
    """(steps that fit into `seconds` with the report, the rest), in order; a later one may fit where one did not."""
    left, taken, dropped = seconds - REPORT_S, [], []
    for step in steps:
        fits = step.seconds <= left
        (taken if fits else dropped).append(step)
        left -= step.seconds * fits
    return taken, dropped


def main(out: Path, seconds: int = SECONDS) -> int:
    """Runs the plan into the folder `out`; 1 where there is no GPU, or a step failed or was cut off."""
    if not torch.cuda.is_available():
        print(f"There is no GPU here that torch {torch.__version__} can use, so nothing was measured.", file=sys.stderr)
        return 1
    start, out = time.monotonic(), out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    taken, dropped = fitting(plan(), seconds)
    faults = [f"{step.command} does not fit: it needs {step.seconds} s" for step in dropped]
    faults += follow(stretched(taken, seconds), lambda step, limit_s: run_step(step.arguments(out), limit_s))
    faults += [f"not measured: {suite} {case}" for suite, case in missing(taken, out, started)]
    report = run_step(["report", str(out)], seconds - (time.monotonic() - start))
    faults += [f"report: {report}"] if report else []
    print("\n".join(faults) or "everything was measured", f"results: {out / 'report.html'}", sep="\n")
    return int(bool(faults))


def follow(steps: list[Step], run: Callable[[Step, float], str | None]) -> list[str]:
    """Runs each step within what is planned until its end; the faults."""
    start, end, faults = time.monotonic(), 0.0, []
    for step in steps:
        end += step.seconds
        fault = run(step, end - (time.monotonic() - start))
        faults += [f"{step.command}: {fault}"] if fault else []
    return faults


def run_step(arguments: list[str], limit_s: float) -> str | None:
    """`python -m bench ...`, ended with all that it started after `limit_s`; what went wrong, or None."""
    print(f"== {' '.join(arguments[:1])} (at most {limit_s:.0f} s)", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "bench", *arguments], cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(limit_s)
        return f"ended with {status}" if status else None
    except subprocess.TimeoutExpired:
        return f"cut off after {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def missing(steps: list[Step], out: Path, started: str) -> list[tuple[str, str]]:
    """(suite, case) of every case that has no record since `started`."""
    records = [m for path in out.glob("*.json") for m in load(path) if m.date >= started]
    done = {(m.suite, m.case) for m in records}
    return [(step.command, case) for step in steps for case in step.cases if (step.command, case) not in done]


# The kernels against float64


def check_kernels(backends: tuple[str, ...] = BACKENDS, n: int = 2100, v: int = 9001) -> int:
    """Prints each kernel's largest error as a share of its budget; 1 if one is wrong or cannot run."""
    device, failed = "cuda" if torch.cuda.is_available() else "cpu", 0
    for name, check in checks(backends, n, v, device):
        try:
            share = check()
            verdict = f"{share:6.1%} of its budget" if share <= 1 else f"WRONG: {share:.3g} times its budget"
            failed += not share <= 1  # nan is wrong too
        except Exception as error:  # one kernel's fault must not hide the others'
            verdict, failed = f"CANNOT RUN: {type(error).__name__}: {str(error).splitlines()[:1]}", failed + 1
        print(f"{name:<60} {verdict}", flush=True)
    return int(failed > 0)


def checks(backends: tuple[str, ...], n: int, v: int, device: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """(name, a function that returns the largest error over its budget) of each op, dtype and backend."""
    for dtype in ("bfloat16", "float16", "float32"):
        for kind in ops.FLOOR:
            inputs = ops.make_inputs(ops.Case(kind, dtype, n, 144, v, 50))
            truth = ops.Truth(kind, inputs)
            for backend in backends:
                yield f"linear_logprobs {kind} {dtype} {backend}", partial(_by_truth, backend, truth)
        for backend in backends:
            for name, has, function, tensors in _variants(getattr(torch, dtype), n, v, device):
                if backend in has:
                    yield f"{name} {dtype} {backend}", partial(compare, function, tensors, backend)
    for dtype in ("bfloat16", "float16") if "torch" in backends else ():
        for shape in ((1000, 576, 576), *([(2048, 4096, 14336)] if device == "cuda" else [])):
            check = partial(young_adapter, getattr(torch, dtype), device, *shape)
            yield f"lora of a young adapter {dtype} {'x'.join(map(str, shape))}", check


def young_adapter(dtype: torch.dtype, device: str, tokens: int, inputs: int, outputs: int) -> float:
    """How far a LoRA layer is from keeping, on average, a part below the last place of its results, or of the gradient
    in its inputs: the slope of what the adapter changes on what it should, less 1, over four standard errors. A result
    that is rounded before has about a half of it, or less.
    """
    # Loads transformers, for which each process that weighs an op would wait.
    from peft import LoraConfig, get_peft_model

    rank, generator = 8, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    layer = torch.nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
    layer.weight.data, x = draw(outputs, inputs).to(dtype), draw(tokens, inputs).to(dtype).requires_grad_()
    scaling = torch.finfo(dtype).eps / 8 / rank**0.5
    config = LoraConfig(r=rank, lora_alpha=rank * scaling, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(layer), config)
    a, b = (p for p in model.parameters() if p.requires_grad)
    a.data, b.data, upstream = draw(rank, inputs), draw(outputs, rank), draw(tokens, outputs).to(dtype)
    speed_up_linear(model)

    def taken() -> list[Tensor]:
        y = model(x)
        return [y.detach().double(), torch.autograd.grad(y, x, upstream)[0].double()]

    a64, b64, with_it = a.detach().double(), b.detach().double(), taken()
    parts = [scaling * (x.detach().double() @ a64.T @ b64.T), scaling * (upstream.double() @ b64 @ a64)]
    b.data.zero_()
    shares = []
    for moved, without, part in zip(with_it, taken(), parts, strict=True):
        slope = ((moved - without) * part).sum() / part.square().sum()
        unit = 2 * torch.finfo(dtype).eps * without.square().mean().sqrt()  # of the last place, of most results
        shares.append(float(abs(slope - 1) * part.square().sum().sqrt() / (4 * unit)))
    return _worst(shares)


def _by_truth(backend: str, truth: ops.Truth) -> float:
    outputs = truth.pick(ops.candidate(f"fastalign {backend}", truth.kind, truth.inputs)())
    shares = [ops.error_of(name, value, truth.exact[name]) / truth.budgets[name] for name, value in outputs.items()]
    return _worst(shares)


def _variants(dtype: torch.dtype, n: int, v: int, device: str) -> Iterator[tuple[str, tuple, Callable, list[Tensor]]]:
    """(name, its op's backends, f(*tensors, backend), tensors) of the paths that the suite's cases do not take."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).to(device, dtype)

    hidden, weight = (t.to(device, dtype) for t in draw_head(generator, n, 144, v))
    targets = torch.randint(v, (n,), generator=generator).to(device)
    offsets = torch.linspace(0, n, 9).long().to(device)
    fishers = torch.rand(n, 144, generator=generator).to(device)

    def capped(h, w, b, backend):
        options = {"softcap": 10.0, "temperature": 0.7, "logit_scale": 0.9, "entropy": True}
        return linear_logprobs(h, w, targets, bias=b, backend=backend, **options)

    def recomputed(h, w, backend):
        return linear_logprobs(h, w, targets, memory_budget=0, backend=backend)

    def gathered(logits, backend):
        return selective_logprobs(logits, targets[: len(logits)], temperature=0.7, backend=backend)

    def divergence(name, h, w, backend):
        return linear_divergence(h, w, h.detach(), w.detach().flip(0), divergence=name, backend=backend)

    def fisher(g, x, backend):
        zeros = torch.zeros(144, 144, dtype=reference.compute_dtype(g), device=device)
        return accumulate_fisher_(zeros, g.detach(), x.detach(), offsets, backend=backend)

    def ewc(theta, backend):
        others = [torch.zeros_like(theta)], [fishers], 0.5
        if backend == "reference":
            return reference.ewc_penalty([theta], *others)
        return ewc_penalty([theta], *others, backend=backend)

    def ewc_(theta, backend):
        """The penalty that adds its gradient to `.grad` itself."""
        leaf = theta.detach().clone().requires_grad_()
        leaf.grad = torch.ones_like(leaf)
        if backend == "reference":
            ewc(leaf, backend).backward()
            return leaf.grad
        ewc_penalty_([leaf], [torch.zeros_like(theta)], [fishers], 0.5, backend=backend)
        return leaf.grad

    frozen = draw(200, 144, scale=0.25)

    def lora(x, a, b, backend):
        weight = frozen.to(x.dtype)
        if backend == "reference":
            return x @ weight.T + 0.5 * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
        return LoraLinearGpu.apply(x, weight, None, a, b, 0.5)

    yield "linear_logprobs capped, biased, entropy", LINEAR, capped, [hidden, weight, draw(v)]
    yield "linear_logprobs recomputed", LINEAR, recomputed, [hidden, weight]
    yield "selective_logprobs", SELECTIVE, gathered, [draw(n // 4, v, scale=3.0)]
    for name in reference.DIVERGENCES:
        yield f"linear_divergence {name}", DIVERGENCE, partial(divergence, name), [hidden, weight]
    yield "accumulate_fisher", FISHER, fisher, [hidden, draw(n, 144)]
    yield "lora of float32 factors", ("torch",), lora, [hidden, draw(16, 144).float(), draw(200, 16).float()]
    yield "ewc_penalty", EWC, ewc, [hidden]
    yield "ewc_penalty_", EWC, ewc_, [hidden]
    if dtype == torch.float32:
        for loss in ("dpo", "ipo", "orpo"):
            zeros = None if loss == "orpo" else torch.zeros(len(offsets) - 1, device=offsets.device)
            pairs = partial(preference_loss, cu_seqlens=offsets, loss_type=loss)


def compare(function: Callable, tensors: list[Tensor], backend: str) -> float:
    """The largest error of outputs and gradients, over its budget: twice what plain code in these dtypes is off from
    float64 and eps of the largest value, and float32's sums (8 sqrt(terms) eps).
    """
    exact = _results(function, [t.double() for t in tensors], "reference")
    low, got = (_results(function, tensors, which) for which in ("reference", backend))
    terms = max(max(t.shape) for t in tensors)
    sums = 8 * math.sqrt(terms) * torch.finfo(torch.float32).eps
    shares = []
    for x, y, z in zip(exact, low, got, strict=True):
        largest, off = float(x.abs().max()), float((y - x).abs().max())
        budget = 2 * (off + torch.finfo(z.dtype).eps * largest) + sums * largest
        shares.append(float((z - x).abs().max()) / budget)
    return _worst(shares)


def _results(function: Callable, tensors: list[Tensor], backend: str) -> list[Tensor]:
    """The outputs, and the gradients of a weighted sum of those that have any."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((o * torch.linspace(-1, 1, o.numel()).to(o).view(o.shape)).sum() for o in outputs if o.requires_grad)
    gradients = torch.autograd.grad(total, leaves) if isinstance(total, Tensor) else ()
    return [t.detach() for t in (*outputs, *gradients)]


def _worst(shares: list[float]) -> float:
    return math.nan if any(map(math.isnan, shares)) else max(shares)
