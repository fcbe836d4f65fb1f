"""A check of the GPU in ten minutes: each kernel against float64, then the main cases of the suites, then report.html.

All kernels are checked, but ten minutes are too short to time everything. These are timed, in bfloat16:

- log-probs, forward only and with a frozen head, with 0 and 50 % of the tokens in the prompt
- the gather of log-probs from logits
- DPO's loss
- LoRA training steps on dialogue

Left out are float32, trainable heads, 80 % prompt, memory against the vocabulary, torch.compile, the other losses,
long prompts, tuning of all weights, divergences and Fisher information. `python -m bench SUITE` measures those, also on
a GPU. The suite `scale` is about CPU threads.

Every step runs in a separate process, so a kernel that crashes or hangs does not stop the other steps. The time is
divided among the steps by their planned seconds, and time that a step leaves goes to the next ones. A step that
exceeds its time is stopped, and what it has measured until then stays.
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
from fastalign.ops.accumulate_fisher import BACKENDS as FISHER
from fastalign.ops.accumulate_fisher import accumulate_fisher_
from fastalign.ops.backends import anchored
from fastalign.ops.backends.pick import BACKENDS as DIVERGENCE
from fastalign.ops.backends.pick import BACKENDS as LINEAR
from fastalign.ops.ewc import BACKENDS as EWC
from fastalign.ops.ewc import ewc_penalty, ewc_penalty_
from fastalign.ops.linear_divergence import linear_divergence
from fastalign.ops.linear_logprobs import linear_logprobs
from fastalign.ops.preference_loss import BACKENDS as PREFERENCE
from fastalign.ops.preference_loss import preference_loss
from fastalign.ops.selective_logprobs import BACKENDS as SELECTIVE
from fastalign.ops.selective_logprobs import selective_logprobs

SECONDS = 600
REPORT_S = 30  # part of them, reserved for report.html
BACKENDS = ("torch", "triton", "cuda")
KINDS = ("frozen", "forward")  # of the suite `ops`
WIDTH = 144  # H of the checks
LOGPROBS_OPTIONS = {"softcap": 10.0, "temperature": 0.7, "logit_scale": 0.9, "entropy": True}
EWC_STRENGTH = 0.5
LORA_SCALING = 0.5


class Step(NamedTuple):
    """One call of `python -m bench`, with the seconds planned for it."""

    command: str
    seconds: int
    cases: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def arguments(self, out: Path) -> list[str]:
        """The command line of the step. Its results go to the folder `out`."""
        where = ["--case", *self.cases, *self.options, "--out", str(out)] if self.cases else []
        return [self.command, *where]


def plan() -> list[Step]:
    """The steps, the most important first, with about how long each takes."""

    def matching(suite, *patterns: str) -> tuple[str, ...]:
        return tuple(case for case in suite.CASES if any(fnmatch(case, pattern) for pattern in patterns))

    def of_shape(shape: tuple[int, int, int]) -> tuple[str, ...]:
        size = "x".join(map(str, shape))
        return matching(ops, *(f"{kind}-bfloat16-{size}-mask{mask}" for kind, mask in product(KINDS, (0, 50))))

    # Without torch.compile, which compiles for half a minute per case. `python -m bench ops` measures it.
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
    """The steps with all seconds (minus the report's) divided among them, in proportion to their planned seconds."""
    planned = sum(step.seconds for step in steps)
    return [step._replace(seconds=step.seconds * (seconds - REPORT_S) // planned) for step in steps]


def fitting(steps: list[Step], seconds: int) -> tuple[list[Step], list[Step]]:
    """(steps that fit into `seconds` beside the report, the other steps), both in order.

    After a step that does not fit, a shorter one may still fit.
    """
    left, taken, dropped = seconds - REPORT_S, [], []
    for step in steps:
        fits = step.seconds <= left
        (taken if fits else dropped).append(step)
        left -= step.seconds * fits
    return taken, dropped


def main(out: Path, seconds: int = SECONDS) -> int:
    """Runs the plan, with results in the folder `out`. Returns 1 if there is no GPU or a step failed, else 0."""
    if not torch.cuda.is_available():
        print(f"There is no GPU here that torch {torch.__version__} can use, so nothing was measured.", file=sys.stderr)
        return 1
    start, out = time.monotonic(), out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    taken, dropped = fitting(plan(), seconds)
    faults = [f"{step.command} does not fit into {seconds} s: it needs {step.seconds} s" for step in dropped]
    faults += follow(stretched(taken, seconds), lambda step, limit_s: run_step(step.arguments(out), limit_s))
    faults += [f"not measured: {suite} {case}" for suite, case in missing(taken, out, started)]
    report = run_step(["report", str(out)], seconds - (time.monotonic() - start))
    faults += [f"report: {report}"] if report else []
    print("\n".join(faults) or "everything was measured", f"results: {out / 'report.html'}", sep="\n")
    return int(bool(faults))


def follow(steps: list[Step], run: Callable[[Step, float], str | None]) -> list[str]:
    """Runs the steps and returns their faults. run(step, limit_s) returns a fault or None.

    A step may run until the sum of the planned seconds up to its end has passed.
    """
    start, end, faults = time.monotonic(), 0.0, []
    for step in steps:
        end += step.seconds
        fault = run(step, end - (time.monotonic() - start))
        faults += [f"{step.command}: {fault}"] if fault else []
    return faults


def run_step(arguments: list[str], limit_s: float) -> str | None:
    """Runs `python -m bench ...`, and says what went wrong or returns None.

    After `limit_s` seconds the process is killed, with all processes that it has started.
    """
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
    """(suite, case) of every case of the steps that has no record since `started`."""
    records = [m for path in out.glob("*.json") for m in load(path) if m.date >= started]
    done = {(m.suite, m.case) for m in records}
    return [(step.command, case) for step in steps for case in step.cases if (step.command, case) not in done]


# The kernels against float64


def check_kernels(backends: tuple[str, ...] = BACKENDS, n: int = 2100, v: int = 9001) -> int:
    """Prints the largest error of each kernel as a share of its budget. Returns 1 if one is wrong or cannot run."""
    device, failed = "cuda" if torch.cuda.is_available() else "cpu", 0
    for name, check in checks(backends, n, v, device):
        try:
            share = check()
            verdict = f"{share:6.1%} of its budget" if share <= 1 else f"WRONG: {share:.3g} times its budget"
            failed += not share <= 1  # nan counts as wrong
        except Exception as error:  # an error in one kernel must not hide the results of the others
            verdict, failed = f"CANNOT RUN: {type(error).__name__}: {str(error).splitlines()[:1]}", failed + 1
        print(f"{name:<60} {verdict}", flush=True)
    return int(failed > 0)


def checks(backends: tuple[str, ...], n: int, v: int, device: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """(name, check) of each op, dtype and backend. A check returns the largest error divided by its budget."""
    for dtype in ("bfloat16", "float16", "float32"):
        for kind in ops.FLOOR:
            inputs = ops.make_inputs(ops.Case(kind, dtype, n, 144, v, 50))
            truth = ops.Truth(kind, inputs)
            for backend in (*backends, *_also_anchored(dtype)):
                yield f"linear_logprobs {kind} {dtype} {backend}", partial(_by_truth, backend, truth)
        for backend in backends:
            for variant in _variants(getattr(torch, dtype), n, v, device):
                if backend in variant.backends:
                    check = partial(compare, variant.function, variant.tensors, backend)
                    yield f"{variant.name} {dtype} {backend}", check
    for dtype in ("bfloat16", "float16") if "torch" in backends else ():
        for shape in ((1000, 576, 576), *([(2048, 4096, 14336)] if device == "cuda" else [])):
            check = partial(young_adapter, getattr(torch, dtype), device, *shape)
            yield f"lora of a young adapter {dtype} {'x'.join(map(str, shape))}", check


def _also_anchored(dtype: str) -> tuple[str, ...]:
    """The anchored kernels, where there is a GPU for them: they take 16 bits, from Hopper on."""
    fits = torch.cuda.is_available() and torch.cuda.get_device_capability() >= anchored.CAPABILITY
    return ("anchored",) if fits and dtype != "float32" else ()


def young_adapter(dtype: torch.dtype, device: str, tokens: int, inputs: int, outputs: int) -> float:
    """How well a LoRA layer keeps, on average, an adapter whose output is smaller than the last digit of the result.

    What the adapter really changes is regressed on what it should change, for the outputs and for the gradient in the
    inputs. If the layer rounds only its sum, rounding errors average out and the slope is 1. If it rounds the product
    of the layer before it adds the adapter, the slope is about a half or less.

    Returns:
        The larger |slope - 1| of the two, divided by four standard errors. Above 1 the layer is wrong.
    """
    # Imported here because both load transformers, which takes seconds. Every process that measures the memory of an op
    # imports this module.
    from peft import LoraConfig, get_peft_model

    from fastalign.models import linear

    rank, generator = 8, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    layer = torch.nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
    layer.weight.data, x = draw(outputs, inputs).to(dtype), draw(tokens, inputs).to(dtype).requires_grad_()
    scaling = torch.finfo(dtype).eps / 8 / rank**0.5  # makes the adapter's output smaller than a rounding step
    config = LoraConfig(r=rank, lora_alpha=rank * scaling, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(layer), config)
    a, b = (p for p in model.parameters() if p.requires_grad)
    a.data, b.data, upstream = draw(rank, inputs), draw(outputs, rank), draw(tokens, outputs).to(dtype)
    linear.speed_up_linear(model)

    def taken() -> list[Tensor]:
        y = model(x)
        return [y.detach().double(), torch.autograd.grad(y, x, upstream)[0].double()]

    a64, b64, with_it = a.detach().double(), b.detach().double(), taken()
    parts = [scaling * (x.detach().double() @ a64.T @ b64.T), scaling * (upstream.double() @ b64 @ a64)]
    b.data.zero_()
    shares = []
    for moved, without, part in zip(with_it, taken(), parts, strict=True):
        slope = ((moved - without) * part).sum() / part.square().sum()
        unit = 2 * torch.finfo(dtype).eps * without.square().mean().sqrt()  # bounds the rounding step of most results
        shares.append(float(abs(slope - 1) * part.square().sum().sqrt() / (4 * unit)))
    return _worst(shares)


def _by_truth(backend: str, truth: ops.Truth) -> float:
    outputs = truth.pick(ops.candidate(f"fastalign {backend}", truth.kind, truth.inputs)())
    shares = [ops.error_of(name, value, truth.exact[name]) / truth.budgets[name] for name, value in outputs.items()]
    return _worst(shares)


class Variant(NamedTuple):
    """One path of an op that the cases of the suites do not take.

    Attributes:
        name: name of the check.
        backends: the op's backends.
        function: f(*tensors, backend=...) -> output or outputs. The backend "reference" is the definition.
        tensors: its arguments.
    """

    name: str
    backends: tuple[str, ...]
    function: Callable
    tensors: list[Tensor]


def _variants(dtype: torch.dtype, n: int, v: int, device: str) -> Iterator[Variant]:
    """The variants for one dtype, N rows and V vocabulary entries."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).to(device, dtype)

    hidden, weight = (t.to(device, dtype) for t in draw_head(generator, n, WIDTH, v))  # (N, H), (V, H)
    targets = torch.randint(v, (n,), generator=generator).to(device)
    offsets = torch.linspace(0, n, 9).long().to(device)  # of 8 sequences
    fishers = torch.rand(n, WIDTH, generator=generator).to(device)
    frozen = draw(200, WIDTH, scale=0.25)

    yield Variant(
        "linear_logprobs capped, biased, entropy", LINEAR, partial(_capped, targets), [hidden, weight, draw(v)]
    )
    yield Variant("linear_logprobs recomputed", LINEAR, partial(_recomputed, targets), [hidden, weight])
    yield Variant("selective_logprobs", SELECTIVE, partial(_gathered, targets), [draw(n // 4, v, scale=3.0)])
    for name in reference.DIVERGENCES:
        yield Variant(f"linear_divergence {name}", DIVERGENCE, partial(_divergence, name), [hidden, weight])
    yield Variant("accumulate_fisher", FISHER, partial(_fisher, offsets), [hidden, draw(n, WIDTH)])
    factors = [draw(16, WIDTH).float(), draw(200, 16).float()]
    yield Variant("lora of float32 factors", ("torch",), partial(_lora, frozen), [hidden, *factors])
    yield Variant("ewc_penalty", EWC, partial(_ewc, fishers), [hidden])
    yield Variant("ewc_penalty_", EWC, partial(_ewc_in_place, fishers), [hidden])
    for loss in ("dpo", "ipo", "orpo") if dtype == torch.float32 else ():
        yield Variant(f"preference_loss {loss}", PREFERENCE, partial(_preference, loss, offsets), [draw(n).abs().neg()])


# The functions of the variants: what they need that has no gradient, then the tensors, then the backend.


def _capped(targets, h, w, b, backend):
    return linear_logprobs(h, w, targets, bias=b, backend=backend, **LOGPROBS_OPTIONS)


def _recomputed(targets, h, w, backend):
    return linear_logprobs(h, w, targets, memory_budget=0, backend=backend)


def _gathered(targets, logits, backend):
    return selective_logprobs(logits, targets[: len(logits)], temperature=0.7, backend=backend)


def _divergence(name, h, w, backend):
    return linear_divergence(h, w, h.detach(), w.detach().flip(0), divergence=name, backend=backend)


def _fisher(offsets, g, x, backend):
    zeros = torch.zeros(WIDTH, WIDTH, dtype=reference.compute_dtype(g), device=g.device)
    return accumulate_fisher_(zeros, g.detach(), x.detach(), offsets, backend=backend)


def _ewc(fishers, theta, backend):
    others = [torch.zeros_like(theta)], [fishers], EWC_STRENGTH
    if backend == "reference":
        return reference.ewc_penalty([theta], *others)
    return ewc_penalty([theta], *others, backend=backend)


def _ewc_in_place(fishers, theta, backend):
    """The gradient after the penalty that adds to `.grad` itself."""
    leaf = theta.detach().clone().requires_grad_()
    leaf.grad = torch.ones_like(leaf)
    if backend == "reference":
        _ewc(fishers, leaf, backend).backward()
    else:
        ewc_penalty_([leaf], [torch.zeros_like(theta)], [fishers], EWC_STRENGTH, backend=backend)
    return leaf.grad


def _lora(frozen, x, a, b, backend):
    from fastalign.models.linear import LoraLinearGpu  # imported here as in `young_adapter`

    weight = frozen.to(x.dtype)
    if backend == "reference":
        return x @ weight.T + LORA_SCALING * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
    return LoraLinearGpu.apply(x, weight, None, a, b, LORA_SCALING)


def _preference(loss, offsets, p, backend):
    zeros = None if loss == "orpo" else torch.zeros(len(offsets) - 1, device=offsets.device, dtype=p.dtype)
    return preference_loss(p, cu_seqlens=offsets, loss_type=loss, ref_sums=zeros, backend=backend).losses


def compare(function: Callable, tensors: list[Tensor], backend: str) -> float:
    """The largest error of outputs and gradients against float64, divided by its budget.

    The budget is the sum of:

    - twice the error that plain code has in these dtypes, plus twice the eps of the largest value
    - the error of float32 sums (8 sqrt(terms) eps of the largest value)
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
    """The outputs, and the gradients of a weighted sum of the outputs that are differentiable."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((o * torch.linspace(-1, 1, o.numel()).to(o).view(o.shape)).sum() for o in outputs if o.requires_grad)
    gradients = torch.autograd.grad(total, leaves) if isinstance(total, Tensor) else ()
    return [t.detach() for t in (*outputs, *gradients)]


def _worst(shares: list[float]) -> float:
    return math.nan if any(map(math.isnan, shares)) else max(shares)
