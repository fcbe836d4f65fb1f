"""Suite `ops`: token log-probabilities from hidden states, beside what people use and the bare matrix products.

Order of work: a case gives the inputs, each implementation becomes a closure over them, and its outputs are compared
with float64. Then bench/harness/measure.py measures time and memory.
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

from bench.harness.measure import FLOOR as PRODUCT
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
    say,
)
from bench.harness.suite import by_name, draw_head, peer
from fastalign.ops.backends.pick import BACKENDS
from fastalign.ops.linear_logprobs import linear_logprobs

SHAPES = ((2048, 576, 49152), (2048, 2048, 49152), (1024, 4096, 128256))  # N, H, V
QUICK_SHAPE = (256, 64, 4096)
# For the plot of memory against V: frozen head, float32, no mask, with N and H of the first shape or the quick shape.
VOCABULARIES = (16384, 32768, 65536, 131072)
QUICK_VOCABULARIES = (4096, 32768)
MASKS = (0, 50, 80)  # % of the rows that belong to the prompt and are not scored
DTYPES = ("float32", "bfloat16")
FLOOR = {"forward": 1, "frozen": 2, "trainable": 3}  # matrix products that no implementation can avoid
CHECKED_ROWS = 64  # of hidden and of weight, because float64 on all rows would take longer than everything else
TRL_CHUNK = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
LIGER_CHUNK = 4096  # liger_kernel.chunked_loss.fused_linear_ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE


@dataclass(frozen=True)
class Case:
    """A case: `n`, `h`, `v` is the shape, `mask` the % of rows that are not scored.

    `kind` is "forward", or the head ("frozen" or "trainable") of a forward and backward pass.
    """

    kind: str
    dtype: str
    n: int
    h: int
    v: int
    mask: int

    @property
    def name(self) -> str:
        """The name in records and on the command line."""
        return f"{self.kind}-{self.dtype}-{self.n}x{self.h}x{self.v}-mask{self.mask}"


QUICK = by_name(
    [Case(kind, "float32", *QUICK_SHAPE, 50) for kind in FLOOR]
    + [Case("frozen", "bfloat16", *QUICK_SHAPE, 50)]
    + [Case("frozen", "float32", *QUICK_SHAPE[:2], v, 0) for v in QUICK_VOCABULARIES]
)
CASES = by_name(
    [Case(kind, dtype, *shape, mask) for shape in SHAPES for kind, dtype, mask in product(FLOOR, DTYPES, MASKS)]
) | by_name([Case("frozen", "float32", *SHAPES[0][:2], v, 0) for v in VOCABULARIES])


class Inputs(NamedTuple):
    """The tensors of a case."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,) int64, -100 where not scored
    grads: Tensor  # (N,) float32: d loss / d logprobs, 0 where not scored


def make_inputs(case: Case, rows: int | None = None) -> Inputs:
    """Seeded inputs, of `rows` rows if given.

    The logits have standard deviation 3. With that, both parts of a gradient `W[y] - sum_j p_j W[j]` are of equal size.
    """
    n = rows or case.n
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (t.to(device, dtype) for t in draw_head(generator, n, case.h, case.v))
    targets = torch.randint(case.v, (n,), generator=generator)
    grads = torch.randn(n, generator=generator)
    prompt = torch.rand(n, generator=generator).argsort() < n * case.mask // 100
    return Inputs(hidden, weight, targets.masked_fill(prompt, -100).to(device), grads.masked_fill(prompt, 0).to(device))


# The implementations: f(hidden, weight, targets) -> logprobs (N,). Rows that are not scored may hold anything.


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What trainers did for years: all logits in the model's dtype, then log_softmax in float32."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The fused function of torch 2.13 and later."""
    options = torch.nn.LinearCrossEntropyOptions()
    functional = torch.nn.functional
    return -functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's chunked log-probs, called as trl.trainer.utils calls them: scored rows on CUDA, elsewhere all rows."""
    apply = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
    if not hidden.is_cuda:
        return apply(hidden, weight, None, targets.clamp(min=0), 1.0, TRL_CHUNK, None, 1.0, ())[0]
    scored = targets >= 0
    logprobs = apply(hidden[scored], weight, None, targets[scored], 1.0, TRL_CHUNK, None, 1.0, ())[0]
    return logprobs.new_zeros(targets.shape).masked_scatter(scored, logprobs)


def liger_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The log-probs inside Liger's chunked GRPO loss, of all rows, because that loss computes all rows."""
    module = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    return module._ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets.clamp(min=0), None, 1.0, LIGER_CHUNK)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cut Cross Entropy of the scored rows: its kernels on CUDA, its torch.compile version on a CPU."""
    impl = "cce" if hidden.is_cuda else "torch_compile"
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return -loss(hidden, weight, targets, reduction="none", impl=impl)


def _compiled_eager() -> Callable:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        if not torch.cuda.is_available():
            get_cpp_compiler()
    except Exception as error:
        raise Missing(f"no C++ compiler for torch.compile ({error})") from error
    return torch.compile(eager, dynamic=False)


def _fastalign(backend: str) -> Callable:
    if backend not in BACKENDS:
        raise Missing(f"this version of fastalign has no backend {backend!r}, only {', '.join(BACKENDS)}")
    return lambda hidden, weight, targets: linear_logprobs(hidden, weight, targets, backend=backend)


def _torch_own() -> Callable:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has no linear_cross_entropy; torch 2.13 has it")
    return torch_linear_cross_entropy


IMPLEMENTATIONS: dict[str, Callable[[], Callable]] = {
    "fastalign torch": lambda: _fastalign("torch"),
    "fastalign cpu": lambda: _fastalign("cpu"),
    "fastalign triton": lambda: _fastalign("triton"),
    "fastalign cuda": lambda: _fastalign("cuda"),
    "fastalign anchored": lambda: _fastalign("anchored"),
    "eager": lambda: eager,
    "torch.compile": _compiled_eager,
    "torch linear_cross_entropy": _torch_own,
    "TRL chunked_logprob": lambda: peer("trl.kernels.chunked_logprob", trl_chunked),
    "Liger chunked logprob": lambda: peer("liger_kernel.chunked_loss.fused_linear_ppo", liger_chunked),
    "Cut Cross Entropy": lambda: peer("cut_cross_entropy", cut_cross_entropy),
}
COMPILES = {"torch.compile", "Cut Cross Entropy"}  # their first run of a shape compiles, which must not count as memory


def products_name(count: int) -> str:
    """The name in records of `count` bare matrix products."""
    return f"{count} {PRODUCT}{'s' if count > 1 else ''}"


def names(kind: str) -> list[str]:
    """The implementations of a kind of case, with the bare products first.

    A trainable head has two floors: 3 products, or 4 if an implementation recomputes the logits in the backward pass.
    """
    counts = (3, 4) if kind == "trainable" else (FLOOR[kind],)
    return [*map(products_name, counts), *IMPLEMENTATIONS]


def candidate(name: str, kind: str, inputs: Inputs) -> Callable[[], Outputs]:
    """A function that computes the case once. Raises Missing, with the reason, if it cannot run here."""
    if name not in IMPLEMENTATIONS:
        return products(int(name.split()[0]), inputs)
    function = IMPLEMENTATIONS[name]()
    hidden, weight, targets, grads = inputs

    def run() -> Outputs:
        if kind == "forward":
            with torch.no_grad():
                return {"logprobs": function(hidden, weight, targets)}
        leaves = [hidden.detach().requires_grad_()]
        leaves += [weight.detach().requires_grad_()] if kind == "trainable" else []
        logprobs = function(leaves[0], leaves[1] if kind == "trainable" else weight, targets)
        gradients = torch.autograd.grad(logprobs, leaves, grads.to(logprobs.dtype))
        return {"logprobs": logprobs.detach()} | dict(zip(("d_hidden", "d_weight"), gradients, strict=False))

    return run


def products(count: int, inputs: Inputs) -> Callable[[], Outputs]:
    """The first `count` of four bare products over the scored rows: logits, d_hidden, d_weight, logits recomputed."""
    hidden, weight = inputs.hidden[inputs.targets >= 0], inputs.weight
    buffers: list[Tensor] = []  # allocated by the first run: they count as memory, but their allocation is not timed

    def run() -> Outputs:
        if not buffers:
            buffers.extend([hidden.new_empty(len(hidden), len(weight)), torch.empty_like(hidden)])
            buffers.append(torch.empty_like(weight) if count > 2 else weight.new_empty(0))
        logits, d_hidden, d_weight = buffers
        torch.mm(hidden, weight.T, out=logits)
        if count > 1:
            torch.mm(logits, weight, out=d_hidden)
        if count > 2:
            torch.mm(logits.T, hidden, out=d_weight)
        if count > 3:
            torch.mm(hidden, weight.T, out=logits)
        return {"products": logits}

    return run


class Truth:
    """The exact results of `CHECKED_ROWS` scored rows in float64, and the error budget of each output.

    For d_weight it has some rows of the weight instead. The budget of an output is the sum of:

    - four times the error of rounding logits, probabilities and the output to the dtype of the inputs
    - the error of float32 sums over H and V terms (8 sqrt(n) eps, after Higham and Mary 2019)
    - for gradients, 4 eps of their largest entry, because some implementations accumulate tiles in the inputs' dtype
    """

    def __init__(self, kind: str, inputs: Inputs):
        self.kind, self.inputs = kind, inputs
        scored = (inputs.targets >= 0).nonzero().squeeze(1)
        self.rows = scored[torch.linspace(0, len(scored) - 1, min(CHECKED_ROWS, len(scored))).long()]
        words = torch.linspace(0, len(inputs.weight) - 1, min(CHECKED_ROWS, len(inputs.weight))).long()
        self.words = torch.cat([words.to(self.rows.device), inputs.targets[self.rows]]).unique()
        self.scope = f"{len(self.rows)} of {len(scored)} scored rows"
        if kind == "trainable":
            self.scope += f", {len(self.words)} of {len(inputs.weight)} rows of d_weight"
        self.exact = self._compute(None)
        self.budgets = self._budgets()

    def check(self, name: str, outputs: Outputs) -> Checked:
        """Errors of the outputs.

        Raises:
            WrongResult: an output is missing, not finite, or over its budget.
        """
        expected = self.exact.keys() - {"products"} if name in IMPLEMENTATIONS else {"products"}
        if outputs.keys() != expected:
            raise WrongResult(f"it returned {sorted(outputs)}, expected {sorted(expected)}")
        errors = {}
        for output, value in self.pick(outputs).items():
            errors[output] = error_of(output, value, self.exact[output])
            if not errors[output] <= self.budgets[output]:  # also where it is nan
                raise WrongResult(
                    f"{output} is off by {errors[output]:.2g}, more than the {self.budgets[output]:.2g} that "
                    f"{self.inputs.hidden.dtype} explains"
                )
        return Checked(errors, self.scope)

    def pick(self, outputs: Outputs) -> Outputs:
        """The rows of the outputs that are checked, in float64."""
        kept_rows = torch.searchsorted((self.inputs.targets >= 0).nonzero().squeeze(1), self.rows)
        index = {"logprobs": self.rows, "d_hidden": self.rows, "d_weight": self.words, "products": kept_rows}
        return {name: value[index[name]].double() for name, value in outputs.items()}

    def _budgets(self) -> dict[str, float]:
        hidden, weight = self.inputs.hidden, self.inputs.weight
        eps, eps32 = torch.finfo(hidden.dtype).eps, torch.finfo(torch.float32).eps
        largest = hidden.float().norm(dim=1).max() * weight.float().norm(dim=1).max()  # bounds sum |h w|
        logits = 8 * eps32 * math.sqrt(hidden.shape[1]) * float(largest)
        sums = 8 * eps32 * math.sqrt(weight.shape[0])
        rounded = self._compute(hidden.dtype)
        budgets = {name: 4 * error_of(name, rounded[name], exact) + sums for name, exact in self.exact.items()}
        budgets["logprobs"] += eps32 * float(self.exact["logprobs"].abs().max()) + logits
        budgets["products"] += 4 * eps + logits / float(self.exact["products"].abs().max())
        for name in self.exact.keys() & {"d_hidden", "d_weight"}:
            budgets[name] += 4 * eps + logits
        return budgets

    def _compute(self, rounding: torch.dtype | None) -> Outputs:
        """The results in float64, computed in tiles of 8192 rows of the weight.

        With `rounding`, logits, probabilities and results are rounded to that dtype.
        """

        def rounded(t: Tensor) -> Tensor:
            return t if rounding is None else t.to(rounding).double()

        def logits_of(hidden: Tensor) -> Tensor:
            return torch.cat([rounded(hidden @ tile.double().T) for tile in weight.split(8192)], dim=1)

        hidden, weight, targets, grads = self.inputs
        hidden64, y = hidden[self.rows].double(), targets[self.rows]
        z = logits_of(hidden64)
        logprobs = z.log_softmax(-1)
        out = {"products": z, "logprobs": rounded(logprobs.gather(1, y.unsqueeze(1)).squeeze(1))}
        if self.kind != "forward":
            p = rounded(logprobs.exp())
            expected = sum(a @ b.double() for a, b in zip(p.split(8192, 1), weight.split(8192), strict=True))
            out["d_hidden"] = rounded((weight[y].double() - expected) * grads[self.rows, None].double())
        if self.kind == "trainable":
            out["d_weight"] = 0
            for block in (targets >= 0).nonzero().squeeze(1).split(256):
                block_hidden = hidden[block].double()
                p = logits_of(block_hidden).softmax(-1)[:, self.words]
                onehot = (targets[block, None] == self.words).double()
                out["d_weight"] += ((onehot - rounded(p)) * grads[block, None].double()).T @ block_hidden
            out["d_weight"] = rounded(out["d_weight"])
        return out


def error_of(output: str, value: Tensor, exact: Tensor) -> float:
    """The largest difference, in nats for log-probs, relative to the largest exact entry for all other outputs."""
    error = (value - exact).abs().max()
    return float(error if output == "logprobs" else error / exact.abs().max())


def memory(case_name: str, implementation: str) -> int:
    """Peak extra bytes of one run. Call it in a fresh process."""
    case = (CASES | QUICK)[case_name]
    warm = case if implementation in COMPILES else Case(case.kind, case.dtype, 16, case.h, 64, 0)
    candidate(implementation, case.kind, make_inputs(warm))()  # a first run loads libraries and starts threads
    return peak_extra_memory(candidate(implementation, case.kind, make_inputs(case)))


def run(case_name: str, rounds: int, limit_s: float) -> list[Measurement]:
    """Measures every implementation of one case. The records name those that are missing or too slow for `limit_s`."""
    case = (CASES | QUICK)[case_name]
    torch.compiler.reset()  # else earlier cases would count towards the limit of recompilations
    inputs = make_inputs(case)

    def part(name: str, fraction: int) -> Callable[[], Outputs]:
        few = case.n // fraction
        return candidate(name, case.kind, Inputs(inputs.hidden[:few], inputs.weight, *(t[:few] for t in inputs[2:])))

    candidates = able(names(case.kind), part, limit_s)
    say("    float64 reference", same_line=True)
    truth = Truth(case.kind, inputs)
    return measure(
        "ops",
        case_name,
        {"n": case.n, "h": case.h, "v": case.v, "mask": case.mask},
        candidates,
        truth.check,
        lambda name: memory_of("ops", case_name, name, lambda name: candidate(name, case.kind, inputs)),
        rounds,
    )
