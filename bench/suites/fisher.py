"""Suite `fisher`: squared gradients of single sequences beside loops and per-sample gradients, and EWC beside a copy.

The kinds of cases:

- "layers": `accumulate_fisher_` on the linear layers of one block of SmolLM2
- "body": `fisher_diagonal` of the linear layers of a model of four such blocks
- "model": `fisher_diagonal` of every parameter of SmolLM2-135M, beside an ordinary forward and backward pass over the
  same packed batch
- "ewc": penalty and gradient over tensors with SmolLM2's shapes. The result is bytes per second, beside those of the
  copy of the suite `machine`, which is measured in the same run

Order of work: `setup` makes the inputs of a case, each implementation becomes a closure over them, and its outputs are
compared with float64. Then bench/harness/measure.py measures time and memory.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.harness import machine
from bench.harness.measure import FLOOR as PRODUCT
from bench.harness.measure import (
    Checked,
    Measurement,
    Missing,
    Outputs,
    WrongResult,
    measure,
    memory_in_fresh_process,
    peak_extra_memory,
    say,
)
from bench.harness.suite import by_name
from bench.suites import ewc
from bench.suites.ewc import BLOCKS, GRADIENT, HIDDEN, INNER, KEYS, LAYERS
from fastalign.errors import BackendError
from fastalign.ops.accumulate_fisher import accumulate_fisher_

MODEL = "smollm2-135m-instruct"
BODY_BLOCKS, BODY_VOCAB = 4, 4096
FLOOR = f"bare {PRODUCT}s"
# Relative to the largest entry of each tensor. It is ten times fastalign's budget of 1e-5, because peers must pass too.
# In the whole model float32 has larger errors, also in an ordinary gradient, because large activations cancel there.
BUDGET = {"layers": 1e-4, "body": 1e-4, "ewc": 1e-4, "model": 1e-3}
LOOP, ORDINARY = "loop over sequences", "ordinary backward"


@dataclass(frozen=True)
class Case:
    """A case of one of the kinds above: `sequences` sequences of `length` tokens. For "ewc" it is blocks of SmolLM2."""

    kind: str
    sequences: int
    length: int = 0

    @property
    def name(self) -> str:
        """The name in records and on the command line."""
        return f"{self.kind}-{self.sequences}x{self.length}" if self.length else self.kind


CASES = by_name([Case("layers", 32, 64), Case("body", 32, 64), Case("model", 16, 64), Case("ewc", BLOCKS)])
QUICK = by_name([Case("layers", 8, 16), Case("body", 4, 16)])

# One block's linear layers


def layers(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Seeded (gradient (T, out), input (T, in)) of each layer."""
    generator = torch.Generator().manual_seed(0)
    tokens = case.sequences * case.length
    return [tuple(torch.randn(tokens, width, generator=generator) for width in shape) for shape in LAYERS]


def _named(tensors) -> Outputs:
    return {f"layer {i}": t for i, t in enumerate(tensors)}


def layers_fused(backend: str, operands, case: Case) -> Outputs:
    """The op of fastalign, layer by layer."""
    bounds = torch.arange(0, case.sequences * case.length + 1, case.length)
    fishers = [g.new_zeros(g.shape[1], x.shape[1]) for g, x in operands]
    pairs = zip(fishers, operands, strict=True)
    return _named(accumulate_fisher_(f, g, x, bounds, backend=backend) for f, (g, x) in pairs)


def layers_loop(operands, case: Case) -> Outputs:
    """Sequence by sequence: computes its gradient, and adds the squares."""
    fishers = [g.new_zeros(g.shape[1], x.shape[1]) for g, x in operands]
    for start, stop in pairwise(range(0, case.sequences * case.length + 1, case.length)):
        for fisher, (g, x) in zip(fishers, operands, strict=True):
            gradient = g[start:stop].T @ x[start:stop]
            fisher.addcmul_(gradient, gradient)
    return _named(fishers)


def layers_per_sample(operands, case: Case) -> Outputs:
    """The gradients of all sequences at once, by the einsum of BackPACK's BatchGrad, and the sum of their squares."""
    split = [(g.view(case.sequences, case.length, -1), x.view(case.sequences, case.length, -1)) for g, x in operands]
    return _named(torch.einsum("nto,nti->noi", g, x).square_().sum(0) for g, x in split)


def layers_products(operands, case: Case) -> Outputs:
    """The gradient of each layer over the whole batch: it needs as many multiplications, but no squares."""
    products = [g.T @ x for g, x in operands]
    return {"product": products[0]}


def layers_truth(operands, case: Case) -> Outputs:
    """The results in float64."""
    wide = [(g.double(), x.double()) for g, x in operands]
    return {**layers_loop(wide, case), **layers_products(wide[:1], case)}


# A model: rows of `length` tokens. All tokens of a row except the first are scored.


def tokens(case: Case, vocab: int) -> Tensor:
    """Seeded token ids (sequences, length)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (case.sequences, case.length), generator=generator)


def body() -> nn.Module:
    """A seeded model of four blocks with SmolLM2's shapes. Only the linear layers of the blocks are trainable."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=BODY_VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=BODY_BLOCKS,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        p.requires_grad_(".layers." in name and p.dim() == 2)
    return model


def whole() -> nn.Module:
    """SmolLM2-135M-Instruct in float32."""
    from fastalign.models.loading import load_model

    return load_model(MODEL, dtype="float32").eval()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter, of the trainable ones."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def nll(model: nn.Module, ids: Tensor) -> Tensor:
    """The negative log-likelihood from the model's logits, summed over all tokens except the first of each row."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def rows_of(ids: Tensor) -> list[dict]:
    """The sequences as fastalign's rows: the first token is the prompt."""
    return [{"prompt_ids": row[:1], "completion_ids": [row[1:]]} for row in ids.tolist()]


def one_pass(model: nn.Module, ids: Tensor) -> Outputs:
    """fastalign: one forward and backward pass over all sequences."""
    from fastalign.fisher.diagonal import fisher_diagonal

    fisher = fisher_diagonal(model, rows_of(ids), tokens_per_batch=ids.numel())
    # fisher_diagonal is a mean over the samples, the other implementations return sums.
    return {name: values.mul_(fisher.samples) for name, values in fisher.items()}


def loop(model: nn.Module, ids: Tensor) -> Outputs:
    """One forward and backward pass per sequence."""
    parameters = trainable(model)
    out = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in ids:
        gradients = torch.autograd.grad(nll(model, row[None]), list(parameters.values()))
        for values, gradient in zip(out.values(), gradients, strict=True):
            values.addcmul_(gradient, gradient)
    return out


def backpack(model: nn.Module, ids: Tensor) -> Outputs:
    """BackPACK's BatchGrad. Per-sample gradients of a layer are squared and freed as soon as they exist."""
    try:
        from backpack import backpack as extension
        from backpack import extend
        from backpack.extensions import BatchGrad
    except ImportError as error:
        # With its dependencies pip would install another torch.
        how = "pip install --no-deps backpack-for-pytorch unfoldNd einops"
        raise Missing(f"{error}; {how}") from error
    if not hasattr(model, "backpack_twin"):
        # `extend` cannot be undone, so it changes a copy. `vars` sets it without making it a submodule of the model.
        vars(model)["backpack_twin"] = copy.deepcopy(model)
        for module in model.backpack_twin.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                extend(module)
    twin, out = model.backpack_twin, {}
    names = {module: f"{name}.weight" for name, module in twin.named_modules() if isinstance(module, nn.Linear)}

    def collect(module: nn.Module) -> None:
        if hasattr(module.weight, "grad_batch"):
            out[names[module]] = module.weight.grad_batch.square_().sum(0)
            del module.weight.grad_batch

    with extension(BatchGrad(), extension_hook=collect):
        nll(twin, ids).backward()
    twin.zero_grad(set_to_none=True)
    return out


def vmapped(model: nn.Module, ids: Tensor) -> Outputs:
    """torch.func: vmap over the gradient function, which holds all gradients of all sequences at once."""
    parameters = {name: p.detach() for name, p in trainable(model).items()}

    def of_row(values: dict[str, Tensor], row: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, values, (), {"input_ids": row[None], "use_cache": False}).logits
        return nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum")

    gradients = torch.func.vmap(torch.func.grad(of_row), (None, 0))(parameters, ids)
    return {name: gradient.square_().sum(0) for name, gradient in gradients.items()}


def ordinary(model: nn.Module, ids: Tensor) -> Outputs:
    """Forward and backward over the packed batch, as fastalign trains. It computes the gradient, not its squares."""
    from fastalign.data.packing import lay_out
    from fastalign.models.scoring import prepare

    batch = lay_out(rows_of(ids), "padded" if prepare(model) == "padded" else "packed", 0)
    gradients = torch.autograd.grad(-model(packed=batch).logprobs.sum(), list(trainable(model).values()))
    return {GRADIENT + name: g for name, g in zip(trainable(model), gradients, strict=True)}


def model_products(head: int, model: nn.Module, ids: Tensor) -> Outputs:
    """The bare products of a forward and backward pass.

    Each linear layer has three: its output, the gradient in its input, and the gradient in its weight. In addition
    there are `head` products with the whole vocabulary.
    """
    made, weights, tile = product_operands(ids.numel())
    config = model.config
    for _ in range(config.num_hidden_layers):
        for out, width in LAYERS:
            weight = weights[out, width]
            for a, b in ((made[width], weight.T), (made[out], weight), (made[out].T, made[width])):
                torch.mm(a, b)
    for _ in range(head * config.vocab_size // len(tile)):
        made[HIDDEN] @ tile.T
    return {"product": made[HIDDEN] @ weights[LAYERS[0]].T}


@lru_cache(1)
def product_operands(count: int) -> tuple[dict[int, Tensor], dict[tuple[int, int], Tensor], Tensor]:
    """Seeded operands: width -> (count, width), shape -> weight, and a tile (512, HIDDEN) of the vocabulary."""
    generator = torch.Generator().manual_seed(2)
    made = {n: torch.randn(count, n, generator=generator) for n in (HIDDEN, INNER, KEYS)}
    weights = {shape: torch.randn(*shape, generator=generator) for shape in LAYERS}
    return made, weights, torch.randn(512, HIDDEN, generator=generator)


def model_truth(model: nn.Module, ids: Tensor) -> Outputs:
    """The loop over sequences in float64: sums of squared gradients, and sums of gradients."""
    model = copy.deepcopy(model).double()
    parameters = trainable(model)
    out = {name: torch.zeros_like(p) for name, p in parameters.items()}
    out |= {GRADIENT + name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in ids:
        gradients = torch.autograd.grad(nll(model, row[None]), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            out[name].addcmul_(gradient, gradient)
            out[GRADIENT + name] += gradient
    made, weights, _ = product_operands(ids.numel())
    return out | {"product": made[HIDDEN].double() @ weights[LAYERS[0]].double().T}


# What is measured: kind -> function, whose arguments are what `setup` returns.
PRODUCTS = {
    "layers": layers_products, "body": partial(model_products, 2), "model": partial(model_products, 3),
}  # fmt: skip
IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "fastalign": {"layers": partial(layers_fused, "auto"), "body": one_pass, "model": one_pass,
                  "ewc": partial(ewc.in_place, "auto")},
    "fastalign torch": {"layers": partial(layers_fused, "torch"), "ewc": partial(ewc.in_place, "torch")},
    "fastalign, autograd": {"ewc": ewc.autograd},
    ORDINARY: {"body": ordinary, "model": ordinary},
    LOOP: {"layers": layers_loop, "body": loop, "model": loop},
    "per-sample gradients": {"layers": layers_per_sample},
    "BackPACK BatchGrad": {"body": backpack},
    "torch.func vmap": {"body": vmapped},
    "torch": {"ewc": ewc.plain},
}  # fmt: skip
TRUTH = {"layers": layers_truth, "body": model_truth, "model": model_truth, "ewc": ewc.truth}


def setup(case: Case) -> tuple:
    """The arguments of every function for this kind of case."""
    if case.kind == "layers":
        return layers(case), case
    if case.kind == "ewc":
        return ewc.tensors(case.sequences)
    model = body() if case.kind == "body" else whole()
    return model, tokens(case, model.config.vocab_size)


def small(case: Case, of: tuple) -> tuple:
    """The arguments of the case, reduced to one sequence."""
    if case.kind == "layers":
        return [(g[: case.length], x[: case.length]) for g, x in of[0]], replace(case, sequences=1)
    return of if case.kind == "ewc" else (of[0], of[1][:1])


def functions(case: Case) -> dict[str, Callable]:
    """Name -> function, of the implementations that have this kind of case, with the bare products first."""
    floor = {FLOOR: PRODUCTS[case.kind]} if case.kind in PRODUCTS else {}
    return floor | {name: kinds[case.kind] for name, kinds in IMPLEMENTATIONS.items() if case.kind in kinds}


class Truth:
    """The exact results in float64. For EWC also the gradients before each run, because a run adds to them."""

    def __init__(self, case: Case, of: tuple):
        self.kind, self.exact = case.kind, TRUTH[case.kind](*of)
        self.before = {f"{GRADIENT}{i}": of[0][i].grad.clone() for i in ewc.CHECKED} if case.kind == "ewc" else {}

    def check(self, name: str, outputs: Outputs) -> Checked:
        """The largest error per sort of output ("fisher", "gradient", ...), relative to the tensor's largest entry.

        Raises:
            WrongResult: an output is missing, unexpected, not finite, or over its budget.
        """
        if odd := sorted(outputs.keys() ^ self._expected(name)):
            raise WrongResult(f"{len(odd)} outputs ({odd[0]}, ...) are missing or unexpected")
        errors: dict[str, float] = {}
        for output, value in outputs.items():
            exact, found = self.exact[output], value.detach()
            if output in self.before:  # the run added to this gradient: take the difference
                found, self.before[output] = found - self.before[output], found.clone()
            error = float((found.double() - exact).abs().max() / exact.abs().max())
            if not error <= BUDGET[self.kind]:  # also where it is nan
                raise WrongResult(f"{output} is off by {error:.2g}, more than {BUDGET[self.kind]:.2g}")
            sort = _sort(output)
            errors[sort] = max(error, errors.get(sort, 0.0))
        return Checked(errors, f"{len(self.before)} gradients" if self.before else "everything")

    def _expected(self, name: str) -> set[str]:
        if self.kind == "ewc":
            return set(self.exact)
        wanted = {FLOOR: "product", ORDINARY: "gradient"}.get(name, "fisher")
        return {output for output in self.exact if _sort(output) == wanted}


def _sort(output: str) -> str:
    return "gradient" if output.startswith(GRADIENT) else output if output in ("product", "penalty") else "fisher"


def memory(case_name: str, implementation: str) -> int:
    """Peak extra bytes of one run. Call it in a fresh process."""
    case = (CASES | QUICK)[case_name]
    of, function = setup(case), functions(case)[implementation]
    function(*small(case, of))  # a first run loads libraries and starts threads
    return peak_extra_memory(lambda: function(*of))


def run(case_name: str, rounds: int, limit_s: float) -> list[Measurement]:
    """Measures every implementation of one case, and says which ones are missing or too slow."""
    case = (CASES | QUICK)[case_name]
    of = setup(case)
    say("    float64", same_line=True)
    truth, sizes = Truth(case, of), {"sequences": case.sequences, "length": case.length}
    if case.kind == "ewc":
        (copied,) = machine.run("copy", 5, limit_s)
        moved = ewc.MOVES * 4 * sum(p.numel() for p in of[0])
        sizes = {"bytes": moved, "copy_bytes_per_s": round(copied.sizes["bytes"] / copied.median_s)}
    able = {name: function for name, function in functions(case).items() if _able(name, function, case, of, limit_s)}
    candidates: dict[str, Callable[[], Outputs]] = {name: partial(function, *of) for name, function in able.items()}
    return measure(
        "fisher", case_name, sizes, candidates, truth.check,
        lambda name: memory_in_fresh_process("fisher", case_name, name), rounds,
    )  # fmt: skip


def _able(name: str, function: Callable, case: Case, of: tuple, limit_s: float) -> bool:
    """Whether the implementation can run here within the limit. If not, prints why."""
    try:
        return not _too_slow(name, function, case, of, limit_s)
    except (Missing, BackendError) as reason:
        say(f"    skipped {name}: {reason}")
    except Exception as error:  # an error in one implementation must not stop the others
        say(f"    skipped {name}: it raised {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return False


def _too_slow(name: str, function: Callable, case: Case, of: tuple, limit_s: float) -> bool:
    """Whether the loop over sequences would exceed the limit, judged by the time of one sequence after a warm-up run.

    Other implementations are never too slow, but are run too, which shows whether they work.
    """
    if case.kind == "ewc":
        return False
    one = small(case, of)
    function(*one)
    start = time.perf_counter()
    function(*one)
    seconds = case.sequences * (time.perf_counter() - start)
    if name == LOOP and seconds > limit_s:
        say(f"    skipped {name}: about {seconds:.0f} s a run, over the limit of {limit_s:.0f} s (--limit)")
    return name == LOOP and seconds > limit_s
