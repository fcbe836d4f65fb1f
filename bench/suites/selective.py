"""Suite `selective`: token log-probabilities of logits that exist already, compared with the rate of a copy.

The op is bound by memory. "forward" must read the logits once. "backward", which includes forward, must read them twice
and write their gradient. The result is bytes per second, beside those of the copy of the suite `machine`, which is
measured in the same run.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness import machine
from bench.harness.measure import (
    Checked,
    Measurement,
    Missing,
    Outputs,
    WrongResult,
    able,
    measure,
    memory_of,
    peak_extra_memory,
)
from bench.harness.suite import by_name
from fastalign.ops.selective_logprobs import selective_logprobs

SHAPES, QUICK_SHAPE = ((2048, 49152), (1024, 128256)), (256, 4096)  # N, V
PASSES = {"forward": 1, "backward": 3}  # how often N * V numbers must move
DTYPES = ("float32", "bfloat16")
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Case:
    """A case: `kind` is "forward", or "backward" (which includes forward)."""

    kind: str
    dtype: str
    n: int
    v: int

    @property
    def name(self) -> str:
        """The name in records and on the command line."""
        return f"{self.kind}-{self.dtype}-{self.n}x{self.v}"


CASES = by_name(Case(*parts, *shape) for shape in SHAPES for parts in product(PASSES, DTYPES))
QUICK = by_name(Case(kind, "float32", *QUICK_SHAPE) for kind in PASSES)


class Inputs(NamedTuple):
    """The tensors of a case."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,) int64
    grads: Tensor  # (N,) float32: d loss / d logprobs


def make_inputs(case: Case) -> Inputs:
    """Seeded inputs. The logits have standard deviation 3."""
    device, generator = "cuda" if torch.cuda.is_available() else "cpu", torch.Generator().manual_seed(0)
    logits = torch.randn(case.n, case.v, generator=generator).mul_(3).to(device, getattr(torch, case.dtype))
    targets = torch.randint(case.v, (case.n,), generator=generator).to(device)
    return Inputs(logits, targets, torch.randn(case.n, generator=generator).to(device))


# The implementations: f(logits, targets) -> logprobs (N,).


def eager(logits: Tensor, targets: Tensor) -> Tensor:
    """All log-probs in float32, then the targets' ones."""
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def torch_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of torch, which is the negative log-prob."""
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def trl(logits: Tensor, targets: Tensor) -> Tensor:
    """TRL's function for the same task."""
    try:
        module = importlib.import_module("trl.trainer.utils")
    except ImportError as error:
        raise Missing(f"{error}; pip install 'fastalign[bench]'") from error
    return module.selective_log_softmax(logits, targets)


def fastalign(backend: str) -> Callable:
    """`selective_logprobs` with one backend."""
    return lambda logits, targets: selective_logprobs(logits, targets, backend=backend)


IMPLEMENTATIONS: dict[str, Callable] = {
    "fastalign torch": fastalign("torch"),
    "fastalign cpu": fastalign("cpu"),
    "fastalign triton": fastalign("triton"),
    "fastalign cuda": fastalign("cuda"),
    "eager": eager,
    "torch cross_entropy": torch_cross_entropy,
    "TRL selective_log_softmax": trl,
}


def candidate(name: str, kind: str, inputs: Inputs) -> Callable[[], Outputs]:
    """A function that computes the case once."""
    function = IMPLEMENTATIONS[name]

    def run() -> Outputs:
        if kind == "forward":
            with torch.no_grad():
                return {"logprobs": function(inputs.logits, inputs.targets)}
        logits = inputs.logits.detach().requires_grad_()
        logprobs = function(logits, inputs.targets)
        (gradient,) = torch.autograd.grad(logprobs, logits, inputs.grads.to(logprobs.dtype))
        return {"logprobs": logprobs.detach(), "d_logits": gradient}

    return run


class Truth:
    """The exact results of `CHECKED_ROWS` rows in float64, and the error budget of each output.

    A budget is four times the error of rounding the result to the dtype of the logits, plus the error of a float32 sum
    of V terms (8 sqrt(V) eps).
    """

    def __init__(self, kind: str, inputs: Inputs):
        n, v = inputs.logits.shape
        self.rows = torch.linspace(0, n - 1, min(CHECKED_ROWS, n)).long().to(inputs.targets.device)
        self.scope = f"{len(self.rows)} of {n} rows"
        y = inputs.targets[self.rows].unsqueeze(1)
        logprobs = inputs.logits[self.rows].double().log_softmax(-1)
        self.exact = {"logprobs": logprobs.gather(1, y).squeeze(1)}
        eps, eps32 = torch.finfo(inputs.logits.dtype).eps, torch.finfo(torch.float32).eps
        sums = 8 * math.sqrt(v) * eps32
        self.budgets = {"logprobs": 4 * eps * float(self.exact["logprobs"].abs().max()) + sums}
        if kind == "backward":
            grads = inputs.grads[self.rows, None].double()
            self.exact["d_logits"] = (torch.zeros_like(logprobs).scatter_(1, y, 1.0) - logprobs.exp()) * grads
            self.budgets["d_logits"] = 4 * eps + sums

    def check(self, name: str, outputs: Outputs) -> Checked:
        """Errors of the outputs.

        Raises:
            WrongResult: an output is missing, not finite, or over its budget.
        """
        if outputs.keys() != self.exact.keys():
            raise WrongResult(f"it returned {sorted(outputs)}, expected {sorted(self.exact)}")
        errors = {}
        for output, value in outputs.items():
            exact = self.exact[output]
            error = (value[self.rows].double() - exact).abs().max()
            errors[output] = float(error if output == "logprobs" else error / exact.abs().max())
            if not errors[output] <= self.budgets[output]:  # also where it is nan
                raise WrongResult(f"{output} is off by {errors[output]:.2g}, more than {self.budgets[output]:.2g}")
        return Checked(errors, self.scope)


def memory(case_name: str, implementation: str) -> int:
    """Peak extra bytes of one run. Call it in a fresh process."""
    case = (CASES | QUICK)[case_name]
    small = make_inputs(Case(case.kind, case.dtype, 16, 64))
    candidate(implementation, case.kind, small)()  # a first run loads libraries and starts threads
    return peak_extra_memory(candidate(implementation, case.kind, make_inputs(case)))


def run(case_name: str, rounds: int, limit_s: float) -> list[Measurement]:
    """Measures a copy and every implementation of one case. The records name those that are missing or too slow."""
    case = (CASES | QUICK)[case_name]
    inputs = make_inputs(case)

    def part(name: str, fraction: int) -> Callable[[], Outputs]:
        return candidate(name, case.kind, Inputs(*(t[: case.n // fraction] for t in inputs)))

    candidates = able(list(IMPLEMENTATIONS), part, limit_s)
    (copy,) = machine.run("copy", 5, limit_s)
    moved = PASSES[case.kind] * case.n * case.v * inputs.logits.element_size()
    rate = round(copy.sizes["bytes"] / copy.median_s)
    return measure(
        "selective",
        case_name,
        {"n": case.n, "bytes": moved, "copy_bytes_per_s": rate},
        candidates,
        Truth(case.kind, inputs).check,
        lambda name: memory_of("selective", case_name, name, lambda name: candidate(name, case.kind, inputs)),
        rounds,
    )
