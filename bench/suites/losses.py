"""Suite `losses`: preference losses from hidden states, forward and backward, beside Liger's, TRL's and eager ones.

All implementations minimise the same function of the same tokens:

- sums (dpo, kto) or averages (ipo, orpo, simpo) of the completions' log-probs
- half of the tokens are prompt, and all log-probs of the reference are 0
- orpo includes its NLL term over the chosen completions
- kto's baseline is about the mean of the sums, so that no loss is saturated

Order of work: a case gives the inputs, each implementation becomes a closure over them, and its loss and gradients are
compared with float64. Then bench/harness/measure.py measures time and memory.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

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
from bench.harness.suite import by_name
from bench.suites import ops
from fastalign import fused
from fastalign.losses import REFERENCE_FREE, kto, pairwise_loss

LOSSES = ("dpo", "ipo", "orpo", "simpo", "kto")
BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}
GAMMA = 0.5  # simpo's gamma / beta
KINDS = {"frozen": 2, "trainable": 3}  # head -> matrix products over the completions that cannot be avoided
SHAPE, QUICK_SHAPE = (8, 256, 576, 49152), (4, 64, 64, 4096)  # sequences, tokens per sequence, H, V
CHECKED_ROWS = 64
COMPILES = {"Liger"}


@dataclass(frozen=True)
class Case:
    """A case: `kind` is the head, "frozen" or "trainable". The first half of the sequences is chosen, then rejected."""

    loss: str
    kind: str
    dtype: str
    sequences: int
    tokens: int
    h: int
    v: int

    @property
    def name(self) -> str:
        """The name in records and on the command line."""
        return f"{self.loss}-{self.kind}-{self.dtype}-{self.sequences * self.tokens}x{self.h}x{self.v}"


QUICK = by_name(
    [Case(loss, "frozen", "float32", *QUICK_SHAPE) for loss in LOSSES]
    + [Case("dpo", "trainable", "float32", *QUICK_SHAPE)]
)
CASES = by_name([Case(loss, kind, dtype, *SHAPE) for loss, kind, dtype in product(LOSSES, KINDS, ops.DTYPES)])


class Inputs(NamedTuple):
    """The tensors of a case, of B pairs."""

    hidden: Tensor  # (2B, T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (2B, T) int64, -100 in the first half of each sequence
    labels: Tensor  # (2B,) bool, for kto: True where the completion is desirable


def make_inputs(case: Case, tokens: int | None = None) -> Inputs:
    """Hidden states, weight and targets from the suite `ops`. The logits have standard deviation 3."""
    tokens = tokens or case.tokens
    flat = ops.make_inputs(ops.Case("frozen", case.dtype, case.sequences * tokens, case.h, case.v, 0))
    hidden = flat.hidden.view(case.sequences, tokens, case.h)
    targets = flat.targets.view(case.sequences, tokens).clone()
    targets[:, : tokens // 2] = -100
    labels = torch.arange(case.sequences, device=targets.device) % 2 == 0
    return Inputs(hidden, flat.weight, targets, labels)


def baseline(inputs: Inputs) -> float:
    """Kto's reference point: an estimate of the mean log-prob sum of a completion.

    With a random target and normal logits, a token's log-prob is about -(log V + variance / 2).
    """
    variance = inputs.weight[::16].float().square().sum(1).mean()  # of a logit
    return -float(inputs.targets[0].ge(0).sum() * (math.log(len(inputs.weight)) + variance / 2))


def loss_of(loss: str, logprobs: Tensor, inputs: Inputs) -> Tensor:
    """The scalar that all implementations minimise, from log-probs (2B, T) that are 0 where a token is not scored."""
    sums, lengths = logprobs.sum(1), (inputs.targets >= 0).sum(1)
    zeros = torch.zeros_like(sums)
    if loss == "kto":
        return kto(sums, zeros, inputs.labels, baseline(inputs), beta=BETA[loss]).mean()
    chosen, rejected = sums.chunk(2)
    references = () if loss in REFERENCE_FREE else zeros.chunk(2)
    options = {"beta": BETA[loss]} | ({"gamma_beta_ratio": GAMMA} if loss == "simpo" else {})
    first, second = lengths.chunk(2)
    losses = pairwise_loss(
        loss, None, chosen, rejected, *references, lengths_chosen=first, lengths_rejected=second, options=options
    )
    return losses.mean() - (chosen.sum() / first.sum() if loss == "orpo" else 0.0)


# The implementations: f(loss, hidden, weight, inputs) -> the scalar loss.


def from_logprobs(function: Callable) -> Callable:
    """An implementation of the losses from f(hidden (N, H), weight, targets (N,)) -> log-probs (N,)."""

    def run(loss: str, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        logprobs = function(hidden.flatten(0, 1), weight, inputs.targets.flatten()).view(inputs.targets.shape)
        return loss_of(loss, logprobs.masked_fill(inputs.targets < 0, 0.0), inputs)

    return run


def trl(loss: str, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """TRL: DPOTrainer and KTOTrainer compute logits in chunks, ORPOTrainer and CPOTrainer (simpo) hold all logits."""
    if loss not in ("orpo", "simpo"):
        return from_logprobs(ops.trl_chunked)(loss, hidden, weight, inputs)
    logits = torch.nn.functional.linear(hidden, weight).float()  # accelerate converts a bfloat16 model's logits too
    scored = inputs.targets >= 0
    select = importlib.import_module("trl.trainer.utils").selective_log_softmax
    sums = (select(logits, inputs.targets.clamp(min=0)) * scored).sum(1, keepdim=True)
    half = len(logits) // 2
    out = loss_of("simpo", sums, inputs) if loss == "simpo" else _orpo_of(sums, scored)
    if loss == "orpo":
        chosen = logits[:half].flatten(0, 1), inputs.targets[:half].flatten()
        out = out + torch.nn.functional.cross_entropy(*chosen)
    return out


def _orpo_of(sums: Tensor, scored: Tensor) -> Tensor:
    """TRL's odds ratio term, without the NLL term."""
    chosen, rejected = (sums[:, 0] / scored.sum(1)).chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -BETA["orpo"] * torch.nn.functional.logsigmoid(log_odds).mean()


def liger(loss: str, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    """Liger's chunked losses with their defaults, which are compiled and compute one pair at a time."""
    modules = importlib.import_module("liger_kernel.chunked_loss")
    beta = BETA[loss]
    if loss == "kto":
        module = modules.LigerFusedLinearKTOLoss(beta=beta, use_ref_model=False)
        kl = torch.tensor(baseline(inputs), device=hidden.device)
        return module(hidden, weight, inputs.targets, preference_labels=inputs.labels, kl=kl)[0]
    if loss == "orpo":
        return modules.LigerFusedLinearORPOLoss(beta=beta)(weight, hidden, inputs.targets)[0]
    if loss == "simpo":
        module = modules.LigerFusedLinearSimPOLoss(beta=beta, gamma=beta * GAMMA, compute_nll_loss=False)
        return module(weight, hidden, inputs.targets)[0]
    return modules.LigerFusedLinearDPOLoss(beta=beta, use_ref_model=False)(weight, hidden, inputs.targets)[0]


def fastalign(backend: str) -> Callable:
    """The function `fused_linear_<loss>` of fastalign with one backend."""

    def run(loss: str, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        options = {"beta": BETA[loss], "backend": backend}
        if loss not in REFERENCE_FREE:
            options["ref_logps"] = torch.zeros(len(hidden), device=hidden.device)
        if loss == "kto":
            return fused.fused_linear_kto(
                hidden, weight, inputs.targets, inputs.labels, kl=baseline(inputs), **options
            ).loss
        if loss == "simpo":
            options["gamma_beta_ratio"] = GAMMA
        return getattr(fused, f"fused_linear_{loss}")(hidden, weight, inputs.targets, **options).loss

    return run


IMPLEMENTATIONS: dict[str, Callable] = {
    "fastalign cpu": fastalign("cpu"),
    "fastalign torch": fastalign("torch"),
    "fastalign triton": fastalign("triton"),
    "fastalign cuda": fastalign("cuda"),
    "eager": from_logprobs(ops.eager),
    "TRL": trl,
    "Liger": liger,
}


def names(case: Case) -> list[str]:
    """The implementations of a case, with the bare products first."""
    return [ops.products_name(KINDS[case.kind]), *IMPLEMENTATIONS]


def candidate(name: str, case: Case, inputs: Inputs) -> Callable[[], Outputs]:
    """A function that computes loss and gradients once. Raises Missing, with the reason, if it cannot run here."""
    if name not in IMPLEMENTATIONS:
        flat = ops.Inputs(inputs.hidden.flatten(0, 1), inputs.weight, inputs.targets.flatten(), None)
        return ops.products(KINDS[case.kind], flat)
    package = {"TRL": "trl", "Liger": "liger_kernel"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise Missing(f"no module named {package!r}; pip install 'fastalign[bench]'")
    if name == "Liger" and case.loss == "ipo":
        raise Missing("Liger 0.8.5 does not do IPO")
    function, trainable = IMPLEMENTATIONS[name], case.kind == "trainable"

    def run() -> Outputs:
        hidden = inputs.hidden.detach().requires_grad_()
        weight = inputs.weight.detach().requires_grad_(trainable)
        loss = function(case.loss, hidden, weight, inputs)
        gradients = torch.autograd.grad(loss, [hidden, weight] if trainable else [hidden])
        return {"loss": loss.detach()} | dict(zip(("d_hidden", "d_weight"), gradients, strict=False))

    return run


class Truth:
    """The exact loss and gradients in float64, and the error budget of each output.

    Only some rows of the gradients are checked: `CHECKED_ROWS` of d_hidden, and as many (plus the targets) of d_weight.

    The budgets follow from the errors that log-probs may have, which are the sum of:

    - four times the error of rounding the logits to the dtype of the inputs
    - `delta`: the error of float32 sums over H terms (8 sqrt(H) eps of the largest sum |h w|) and over a completion.
      The worst case is assumed, in which all these errors push the margin the same way

    Loss and coefficients may differ by as much as such log-probs change them. Gradients get the budgets of the suite
    `ops` in addition.
    """

    def __init__(self, case: Case, inputs: Inputs):
        self.case, self.inputs = case, inputs
        self.hidden, self.targets = inputs.hidden.flatten(0, 1), inputs.targets.flatten()
        self.scored = (self.targets >= 0).nonzero().squeeze(1)
        picked = torch.linspace(0, len(self.scored) - 1, min(CHECKED_ROWS, len(self.scored))).long()
        self.rows = self.scored[picked]
        words = torch.linspace(0, len(inputs.weight) - 1, CHECKED_ROWS).long()
        self.words = torch.cat([words.to(self.rows.device), self.targets[self.rows]]).unique()
        self.scope = f"loss, {len(self.rows)} of {len(self.scored)} scored rows of d_hidden"
        if case.kind == "trainable":
            self.scope += f", {len(self.words)} of {len(inputs.weight)} rows of d_weight"
        self.normaliser, logprobs = self._logprobs(None)
        self.exact = self._outputs(logprobs)
        self.budgets = self._budgets(logprobs)

    def check(self, name: str, outputs: Outputs) -> Checked:
        """Errors of the outputs.

        Raises:
            WrongResult: an output is missing, not finite, or over its budget.
        """
        expected = {"products"} if name not in IMPLEMENTATIONS else self.exact.keys() - {"products"}
        if outputs.keys() != expected:
            raise WrongResult(f"it returned {sorted(outputs)}, expected {sorted(expected)}")
        errors = {}
        for output, value in self._pick(outputs).items():
            errors[output] = _error(output, value, self.exact[output])
            if not errors[output] <= self.budgets[output]:  # also where it is nan
                raise WrongResult(
                    f"{output} is off by {errors[output]:.2g}, more than the {self.budgets[output]:.2g} that "
                    f"{self.inputs.hidden.dtype} explains"
                )
        return Checked(errors, self.scope)

    def _pick(self, outputs: Outputs) -> Outputs:
        """The rows of the outputs that are checked, in float64."""
        pick = {
            "products": lambda t: t[torch.searchsorted(self.scored, self.rows)],
            "d_hidden": lambda t: t.flatten(0, 1)[self.rows],
            "d_weight": lambda t: t[self.words],
            "loss": lambda t: t,
        }
        return {name: pick[name](value).double() for name, value in outputs.items()}

    def _logits(self, rows: Tensor, rounding: torch.dtype | None) -> Tensor:
        hidden = self.hidden[rows].double()
        z = torch.cat([hidden @ tile.double().T for tile in self.inputs.weight.split(8192)], dim=1)
        return z if rounding is None else z.to(rounding).double()

    def _logprobs(self, rounding: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """(log-sum-exps (N,), log-probs (N,)), both 0 where a token is not scored."""
        normaliser = torch.zeros(len(self.hidden), dtype=torch.float64, device=self.hidden.device)
        logprobs = normaliser.clone()
        for rows in self.scored.split(256):
            z = self._logits(rows, rounding)
            normaliser[rows] = z.logsumexp(1)
            logprobs[rows] = z.gather(1, self.targets[rows, None]).squeeze(1) - normaliser[rows]
        return normaliser, logprobs

    def _loss(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its derivative in each log-prob (N,)."""
        leaf = logprobs.clone().requires_grad_()
        loss = loss_of(self.case.loss, leaf.view(self.inputs.targets.shape), self.inputs)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0].masked_fill(self.targets < 0, 0.0)

    def _outputs(self, logprobs: Tensor) -> Outputs:
        """Loss and gradients in float64, from the given log-probs and the exact probabilities."""
        loss, coefficients = self._loss(logprobs)
        weight, z = self.inputs.weight, self._logits(self.rows, None)
        p = (z - self.normaliser[self.rows, None]).exp()
        expected = sum(a @ b.double() for a, b in zip(p.split(8192, 1), weight.split(8192), strict=True))
        d_hidden = (weight[self.targets[self.rows]].double() - expected) * coefficients[self.rows, None]
        out = {"loss": loss, "d_hidden": d_hidden, "products": z}
        if self.case.kind == "trainable":
            hidden = self.hidden[self.scored].double()
            p = (hidden @ weight[self.words].double().T - self.normaliser[self.scored, None]).exp()
            onehot = (self.targets[self.scored, None] == self.words).double()
            out["d_weight"] = ((onehot - p) * coefficients[self.scored, None]).T @ hidden
        return out

    def _budgets(self, logprobs: Tensor) -> dict[str, float]:
        hidden, weight = self.inputs.hidden, self.inputs.weight
        eps, eps32 = torch.finfo(hidden.dtype).eps, torch.finfo(torch.float32).eps
        largest = hidden.float().norm(dim=-1).max() * weight.float().norm(dim=1).max()
        logits = 8 * eps32 * math.sqrt(hidden.shape[-1]) * float(largest)
        length = int((self.targets >= 0).sum()) / len(hidden)
        delta = logits / math.sqrt(length) + 8 * eps32 * float(logprobs.abs().max())
        rounding = 0.0 if hidden.dtype == torch.float32 else 4 * (self._logprobs(hidden.dtype)[1] - logprobs)
        up = self._push()
        budgets = dict.fromkeys(self.exact, 4 * eps + logits)
        budgets["products"] += logits / float(self.exact["products"].abs().max())
        budgets["loss"] = 4 * eps32 * float(self.exact["loss"].abs())
        for sign in (-1, 1):
            pushed = self._outputs(logprobs + rounding + sign * delta * up)
            for name in pushed.keys() - {"products"}:
                budgets[name] += _error(name, pushed[name], self.exact[name])
        return budgets

    def _push(self) -> Tensor:
        """(N,): +1 for tokens of chosen (desirable) completions, -1 for rejected ones, 0 for prompts."""
        sequences = len(self.inputs.hidden)
        chosen = self.inputs.labels if self.case.loss == "kto" else torch.arange(sequences) < sequences // 2
        sign = torch.where(chosen.to(self.targets.device), 1.0, -1.0).repeat_interleave(self.inputs.hidden.shape[1])
        return sign.double() * (self.targets >= 0)


def _error(output: str, value: Tensor, exact: Tensor) -> float:
    """The largest difference, absolute for the loss, relative to the largest exact entry for all other outputs."""
    error = (value - exact).abs().max()
    return float(error if output == "loss" else error / exact.abs().max())


def memory(case_name: str, implementation: str) -> int:
    """Peak extra bytes of one run. Call it in a fresh process."""
    case = (CASES | QUICK)[case_name]
    if implementation in COMPILES:
        candidate(implementation, case, make_inputs(case))()  # the first run compiles
    else:
        small = Case(case.loss, case.kind, case.dtype, 4, 8, case.h, 64)
        candidate(implementation, small, make_inputs(small))()  # a first run loads libraries and starts threads
    return peak_extra_memory(candidate(implementation, case, make_inputs(case)))


def run(case_name: str, rounds: int, limit_s: float) -> list[Measurement]:
    """Measures every implementation of one case. The records name those that are missing or too slow for `limit_s`."""
    case = (CASES | QUICK)[case_name]
    torch.compiler.reset()  # else earlier cases would count towards the limit of recompilations
    some = cache(lambda fraction: make_inputs(case, max(case.tokens // fraction, 2)))
    candidates = able(names(case), lambda name, fraction: candidate(name, case, some(fraction)), limit_s)
    inputs = some(1)
    say("    float64 reference", same_line=True)
    truth = Truth(case, inputs)
    return measure(
        "losses",
        case_name,
        {"n": case.sequences * case.tokens, "h": case.h, "v": case.v, "pairs": case.sequences // 2, "mask": 50},
        candidates,
        truth.check,
        lambda name: memory_of("losses", case_name, name, lambda name: candidate(name, case, inputs)),
        rounds,
    )
