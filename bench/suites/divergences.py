"""Suite `divergences`: a distillation step's loss and gradient from hidden states, beside peers and the bare products.

The step computes `sum(mask * divergence) / sum(mask)` and its gradient in the student's hidden states. The student's
head is frozen. Three matrix products cannot be avoided: the student's logits, the teacher's logits, and the gradient in
the student's logits times the weight.

Order of work: a case gives the inputs, each implementation becomes a closure over them, and its outputs are compared
with float64. Then bench/harness/measure.py measures time and memory.
"""

from __future__ import annotations

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
    Outputs,
    WrongResult,
    able,
    measure,
    memory_of,
    peak_extra_memory,
    say,
)
from bench.harness.suite import by_name, draw_head, peer
from fastalign import linear_divergence, reference

SHAPE, QUICK_SHAPE = (2048, 576, 49152), (256, 64, 4096)  # N, H, V; the teacher has the same H
MASKS = (0, 50)  # % of the rows that belong to the prompt and are not scored
VOCABULARIES = (12288, 24576)  # beside that of SHAPE, for the plot of extra memory against V
PRODUCTS = 3
FLOOR = f"{PRODUCTS} {PRODUCT}s"
CHECKED_ROWS = 64  # of d_hidden; the loss is checked over all rows
BLOCK = 128  # rows of float64 logits at a time
# Relative. fastalign's budget, for float32 logits and a divergence of 0.01 or more, is 1e-5. Peers get ten times that.
BUDGET = 1e-4


@dataclass(frozen=True)
class Case:
    """A case: `kind` is the divergence, `n`, `h`, `v` the shape, `mask` the % of rows that are not scored."""

    kind: str
    n: int
    h: int
    v: int
    mask: int

    @property
    def name(self) -> str:
        """The name in records and on the command line."""
        return f"{self.kind}-float32-{self.n}x{self.h}x{self.v}-mask{self.mask}"


QUICK = by_name([Case(kind, *QUICK_SHAPE, 50) for kind in reference.DIVERGENCES])
CASES = by_name(
    [Case(kind, *SHAPE, mask) for kind, mask in product(reference.DIVERGENCES, MASKS)]
    + [Case("forward_kl", *SHAPE[:2], v, 0) for v in VOCABULARIES]
)


class Inputs(NamedTuple):
    """The tensors of a case."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    teacher_hidden: Tensor  # (N, H)
    teacher_weight: Tensor  # (V, H)
    mask: Tensor  # (N,) bool: True where the row is scored


def make_inputs(case: Case) -> Inputs:
    """Seeded inputs.

    The student's logits have standard deviation 3 and the teacher's differ from them by about 1, which makes
    divergences of a few tenths.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scale = 3 / math.sqrt(case.h)
    hidden, weight = draw_head(generator, case.n, case.h, case.v)
    teacher_hidden = hidden + 0.2 * normal(case.n, case.h)
    teacher_weight = weight + 0.2 * scale * normal(case.v, case.h)
    scored = torch.rand(case.n, generator=generator).argsort() >= case.n * case.mask // 100
    return Inputs(hidden, weight, teacher_hidden, teacher_weight, scored)


# The implementations: f(kind, inputs) -> loss. The inputs' `hidden` requires a gradient.


def _fastalign(backend: str) -> Callable:
    def run(kind: str, i: Inputs) -> Tensor:
        out = linear_divergence(*i[:4], mask=i.mask, divergence=kind, backend=backend)
        return out.sum() / i.mask.sum()

    return run


def eager(kind: str, i: Inputs) -> Tensor:
    """Logits of every row, then log_softmax and sums over the vocabulary, which is what trainers do by default."""
    s = (i.hidden @ i.weight.T).log_softmax(-1)
    with torch.no_grad():
        t = (i.teacher_hidden @ i.teacher_weight.T).log_softmax(-1)
    if kind == "jsd":
        m = torch.stack([s, t]).logsumexp(0) - math.log(2)
        values = 0.5 * _kl(t, m) + 0.5 * _kl(s, m)
    else:
        values = _kl(t, s) if kind == "forward_kl" else _kl(s, t)
    return (values * i.mask).sum() / i.mask.sum()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # how TRL and Liger name the divergences


def trl_chunked(kind: str, i: Inputs) -> Tensor:
    """TRL's chunked divergence, called as trl.trainer.distillation_trainer._chunked_divergence_loss calls it.

    Without CUDA it projects all rows, scored or not.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden = (i.hidden, i.weight, None, i.teacher_hidden, i.teacher_weight, None)
    values, _ = ChunkedDivergenceFunction.apply(*hidden, BETA[kind])
    return values.masked_fill(~i.mask, 0).sum() / i.mask.sum()


def liger_jsd(kind: str, i: Inputs) -> Tensor:
    """Liger's chunked JSD loss, compiled (its default), with weight 0 on its cross-entropy part.

    It computes every row, scored or not, and always computes the gradient in the weight.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[kind])
    labels = torch.zeros(len(i.hidden), dtype=torch.long, device=i.hidden.device).masked_fill(~i.mask, -100)
    return loss(i.hidden, i.weight, i.teacher_hidden, i.teacher_weight, labels)


IMPLEMENTATIONS: dict[str, Callable[[], Callable]] = {
    "fastalign torch": lambda: _fastalign("torch"),
    "fastalign cpu": lambda: _fastalign("cpu"),
    "eager": lambda: eager,
    "TRL chunked_divergence": lambda: peer("trl.kernels.chunked_divergence", trl_chunked),
    "Liger fused linear JSD": lambda: peer("liger_kernel.chunked_loss", liger_jsd),
}
COMPILES = {"Liger fused linear JSD"}  # their first run of a shape compiles, which must not count as memory


def candidate(name: str, kind: str, inputs: Inputs) -> Callable[[], Outputs]:
    """A function that computes the case once. Raises Missing, with the reason, if it cannot run here."""
    if name == FLOOR:
        return _products(inputs)
    function = IMPLEMENTATIONS[name]()

    def run() -> Outputs:
        hidden = inputs.hidden.detach().requires_grad_()
        loss = function(kind, inputs._replace(hidden=hidden))
        (d_hidden,) = torch.autograd.grad(loss, hidden)
        return {"loss": loss.detach().reshape(1), "d_hidden": d_hidden}

    return run


def _products(inputs: Inputs) -> Callable[[], Outputs]:
    """The bare matrix products over the scored rows."""
    hidden, teacher_hidden = inputs.hidden[inputs.mask], inputs.teacher_hidden[inputs.mask]
    buffers: list[Tensor] = []  # allocated by the first run: they count as memory, but their allocation is not timed

    def run() -> Outputs:
        if not buffers:
            buffers.extend([hidden.new_empty(len(hidden), len(inputs.weight)) for _ in range(2)])
            buffers.append(torch.empty_like(hidden))
        logits, teacher_logits, d_hidden = buffers
        torch.mm(hidden, inputs.weight.T, out=logits)
        torch.mm(teacher_hidden, inputs.teacher_weight.T, out=teacher_logits)
        torch.mm(logits, inputs.weight, out=d_hidden)
        return {"products": logits}

    return run


class Truth:
    """The exact results: float64, from fastalign.reference.

    They are the loss over all rows, and the gradient `d_hidden` of `CHECKED_ROWS` of the scored rows.
    """

    def __init__(self, kind: str, inputs: Inputs):
        self.scored = inputs.mask.nonzero().squeeze(1)
        picks = torch.linspace(0, len(self.scored) - 1, min(CHECKED_ROWS, len(self.scored))).long()
        self.picks, self.rows = picks, self.scored[picks]
        self.scope = f"all {len(self.scored)} scored rows, d_hidden of {len(self.rows)}"
        weight, teacher_weight = inputs.weight.double(), inputs.teacher_weight.double()

        def values(rows: Tensor, hidden: Tensor) -> Tensor:
            teacher_hidden = inputs.teacher_hidden[rows].double()
            return reference.linear_divergence(hidden, weight, teacher_hidden, teacher_weight, divergence=kind)

        loss = sum(float(values(rows, inputs.hidden[rows].double()).sum()) for rows in self.scored.split(BLOCK))
        hidden = inputs.hidden[self.rows].double().requires_grad_()
        (d_hidden,) = torch.autograd.grad(values(self.rows, hidden).sum(), hidden)
        products = hidden.detach() @ weight.T
        count = len(self.scored)
        self.exact = {
            "loss": torch.tensor([loss / count], dtype=torch.float64),
            "d_hidden": d_hidden / count,
            "products": products,
        }

    def check(self, name: str, outputs: Outputs) -> Checked:
        """Relative errors of the outputs.

        Raises:
            WrongResult: an output is missing, not finite, or over its budget.
        """
        expected = {"products"} if name == FLOOR else {"loss", "d_hidden"}
        if outputs.keys() != expected:
            raise WrongResult(f"it returned {sorted(outputs)}, expected {sorted(expected)}")
        index = {"loss": slice(None), "d_hidden": self.rows, "products": self.picks}
        errors = {}
        for output, value in outputs.items():
            exact = self.exact[output]
            errors[output] = float((value[index[output]].double() - exact).abs().max() / exact.abs().max())
            if not errors[output] <= BUDGET:  # also where it is nan
                raise WrongResult(f"{output} is off by {errors[output]:.2g}, more than {BUDGET:.2g}")
        return Checked(errors, self.scope)


def memory(case_name: str, implementation: str) -> int:
    """Peak extra bytes of one run. Call it in a fresh process."""
    case = (CASES | QUICK)[case_name]
    warm = case if implementation in COMPILES else Case(case.kind, 16, case.h, 64, 0)
    candidate(implementation, case.kind, make_inputs(warm))()  # a first run loads libraries and starts threads
    return peak_extra_memory(candidate(implementation, case.kind, make_inputs(case)))


def run(case_name: str, rounds: int, limit_s: float) -> list[Measurement]:
    """Measures every implementation of one case. The records name those that are missing or too slow for `limit_s`."""
    case = (CASES | QUICK)[case_name]
    torch.compiler.reset()  # else earlier cases would count towards the limit of recompilations
    inputs = make_inputs(case)

    def part(name: str, fraction: int) -> Callable[[], Outputs]:
        rows = {key: getattr(inputs, key)[: case.n // fraction] for key in ("hidden", "teacher_hidden", "mask")}
        return candidate(name, case.kind, inputs._replace(**rows))

    candidates = able([FLOOR, *IMPLEMENTATIONS], part, limit_s)
    say("    float64 reference", same_line=True)
    truth = Truth(case.kind, inputs)
    return measure(
        "divergences",
        case_name,
        {"n": case.n, "h": case.h, "v": case.v, "mask": case.mask},
        candidates,
        truth.check,
        lambda name: memory_of("divergences", case_name, name, lambda name: candidate(name, case.kind, inputs)),
        rounds,
    )
