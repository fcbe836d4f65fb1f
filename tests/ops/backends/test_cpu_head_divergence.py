"""The C++ kernels of linear_divergence: every instruction set this machine runs, by name, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import linear_divergence, reference
from fastalign.errors import BackendError
from fastalign.ops.backends import cpu

EPS = torch.finfo(torch.float32).eps
ISAS = cpu.describe()["kernels_available"]
KINDS = reference.DIVERGENCES
# More than one tile (256) and chunk (2048) of the vocabulary, a multiple of neither; more than one panel of rows.
N, H, G, V, U = 61, 37, 13, 2311, 2400
HEADS = {
    "plain": {},
    "scaled": {"logit_scale": -0.6, "temperature": 0.7, "teacher_logit_scale": 1.2},
    "capped": {"softcap": 5.0, "teacher_softcap": 4.0, "logit_scale": 1.3},
}


def test_the_kernels_are_built():
    """Else every test below would pass by doing nothing."""
    assert "plain" in ISAS and cpu.why_no_kernel("divergence") is None


def problem(dtype=torch.float32, *, n=N, vocab=V, bias=False, spread=2.0, seed=0) -> dict[str, torch.Tensor]:
    """Random student and teacher, logits of standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    out = {
        "hidden": normal(n, H) * spread, "weight": normal(vocab, H) / H**0.5,
        "teacher_hidden": normal(n, G) * spread, "teacher_weight": normal(vocab + U - V, G) / G**0.5,
    }  # fmt: skip
    return out | ({"bias": normal(vocab), "teacher_bias": normal(vocab + U - V)} if bias else {})


def evaluate(function, inputs, leaves=("hidden",), **options):
    """Divergences, and the gradients of a fixed weighted sum of them in the leaves."""
    inputs = {name: t.detach().clone() for name, t in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in leaves]
    out = function(**inputs, **options)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype)
    return out.detach(), *torch.autograd.grad((weights * out).sum(), leaves)


def evaluate_sum(function, inputs, leaves=("hidden",), **options):
    """The same where the weights are known in advance."""
    weights = torch.linspace(-1, 2, len(inputs["hidden"]), dtype=torch.float64)
    inputs = {name: t.detach().clone() for name, t in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in leaves]
    out = function(**inputs, token_weights=weights, **options)
    return out.detach(), *torch.autograd.grad(out.sum(), leaves)


def native(**arguments):
    return linear_divergence(**arguments, backend="cpu")


def doubled(inputs):
    return {name: t.double() for name, t in inputs.items()}


def logit_error(inputs) -> float:
    """A bound on the error of a float32 logit of either side, and of its logsumexp: one rounding a product."""
    sides = ((inputs[f"{of}hidden"].double().abs(), inputs[f"{of}weight"].double().abs()) for of in ("", "teacher_"))
    return max(2 * (h.shape[1] + 8) * EPS * (h @ w.t()).max().item() for h, w in sides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_against_float64(isa, head, kind, dtype):
    """A logit off by e changes a probability by 2 e at most, relatively, and so each term of value and gradient."""
    inputs, options = problem(dtype, bias=True), HEADS[head] | {"divergence": kind, "jsd_beta": 0.3}
    mask = torch.arange(N) % 3 != 1
    values, grad = evaluate(native, inputs, mask=mask, **options)
    exact, exact_grad = evaluate(reference.linear_divergence, doubled(inputs), mask=mask, **options)
    finer = torch.finfo(torch.float64).eps / EPS if dtype == torch.float64 else 1.0
    error = (logit_error(inputs) * max(1.0, 1 / options.get("temperature", 1.0)) + V / 256 * EPS) * finer
    assert values.dtype == reference.compute_dtype(inputs["hidden"]) and grad.dtype == dtype
    assert not values[~mask].any() and not grad[~mask].any()
    assert (values - exact).abs().max() <= 4 * error * exact.abs().max()
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    assert (grad - exact_grad).abs().max() <= (8 * error + rounding) * exact_grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("run", [evaluate_sum, evaluate], ids=["formed in forward", "formed in backward"])
def test_the_gradient_of_a_trainable_head(isa, run, head, kind, dtype):
    """Each entry is a sum over rows, of terms that are off as those of the gradient in hidden are."""
    inputs, options = problem(dtype, bias=True), HEADS[head] | {"divergence": kind, "jsd_beta": 0.3}
    inputs |= {name: t[:V] for name, t in inputs.items() if name.startswith("teacher") and len(t) == U}
    inputs |= {name: torch.cat([inputs[name], torch.ones_like(inputs[name][:5])]) for name in ("weight", "bias")}
    mask = torch.arange(N) % 3 != 1
    leaves = ("hidden", "weight", "bias")
    found = run(native, inputs, leaves, mask=mask, **options)[1:]
    frozen = run(native, inputs, mask=mask, **options)[1]
    exact = evaluate(reference.linear_divergence, doubled(inputs), leaves, mask=mask, **options)[1:]
    finer = torch.finfo(torch.float64).eps / EPS if dtype == torch.float64 else 1.0
    error = (logit_error(inputs) * max(1.0, 1 / options.get("temperature", 1.0)) + (V / 256 + N) * EPS) * finer
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    assert torch.equal(found[0], frozen)
    for name, ours, truth in zip(leaves, found, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).abs().max() <= (8 * error + rounding) * truth.abs().max(), name
        assert name == "hidden" or not ours[V:].any()


@pytest.mark.parametrize("run", [evaluate_sum, evaluate], ids=["formed in forward", "formed in backward"])
@pytest.mark.parametrize("leaves", [("weight",), ("bias",), ("hidden", "bias")], ids=" ".join)
def test_each_gradient_alone_has_the_same_bits(isa, run, leaves):
    inputs, every = problem(bias=True), ("hidden", "weight", "bias")
    everything = dict(zip(every, run(native, inputs, every)[1:], strict=True))
    for name, grad in zip(leaves, run(native, inputs, leaves)[1:], strict=True):
        assert torch.equal(grad, everything[name])


@pytest.mark.parametrize("run", [evaluate_sum, evaluate], ids=["formed in forward", "formed in backward"])
def test_threads_do_not_change_a_bit_of_a_trainable_heads_gradient(isa, threads, run):
    inputs, results = problem(n=230, vocab=5000, bias=True), []
    for count in (1, 2, 8):
        threads(count)
        results.append(run(native, inputs, ("hidden", "weight", "bias"), memory_budget=100 * 5000 * 8))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("kind", KINDS)
def test_within_1e_5_of_float64_at_a_models_size(isa, kind):
    """Relative to each value, and to the largest entry of the gradient.

    Logits have standard deviation 3 and the differences, of which both are made, 0.8: what counts is the rounding of
    the products, some 1e-6 here, over 0.8.
    """
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(24, 576, generator=generator), torch.randn(5000, 576, generator=generator) / 8
    inputs = {"hidden": h, "weight": w}
    inputs |= {
        f"teacher_{name}": t + 0.2 * t.std() * torch.randn(t.shape, generator=generator) for name, t in inputs.items()
    }
    values, grad = evaluate(native, inputs, divergence=kind)
    exact, exact_grad = evaluate(reference.linear_divergence, doubled(inputs), divergence=kind)
    assert 0.01 < exact.min() < exact.max() < 1
    assert ((values - exact) / exact).abs().max() < 1e-5
    assert ((grad - exact_grad).abs().max() / exact_grad.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_200_on_opposite_sides(isa, kind):
    inputs = problem(bias=True, spread=0.1)
    inputs["bias"], inputs["teacher_bias"] = torch.linspace(-200, 200, V), torch.linspace(200, -200, U)
    values, grad = evaluate(native, inputs, divergence=kind)
    exact, exact_grad = evaluate(reference.linear_divergence, doubled(inputs), divergence=kind)
    rounding = 4 * 200 * EPS  # of a logit
    # The terms of a tile are added one by one: at worst half an eps of the sum is lost each time.
    assert (values - exact).abs().max() <= rounding * max(1.0, exact.max() / 200) + 256 / 2 * EPS * exact.max()
    assert (grad - exact_grad).abs().max() <= rounding * inputs["weight"].abs().max() * 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient(isa, head, kind):
    options = {k: v for k, v in HEADS[head].items() if not k.startswith("teacher")}
    options |= {f"teacher_{k}": v for k, v in options.items() if k != "temperature"}
    inputs = {name: t for name, t in problem(bias=True).items() if not name.startswith("teacher")}
    inputs |= {f"teacher_{name}": t.clone() for name, t in inputs.items()}
    values, grad = evaluate(native, inputs, divergence=kind, **options)
    assert not values.any() and not grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_small_divergences_keep_their_digits(isa, distance, kind):
    """A teacher `distance` away: the divergence is of the order of its square, and lost if terms cancel."""
    inputs = problem(spread=1.0)
    inputs |= {"teacher_hidden": inputs["hidden"].clone(), "teacher_weight": inputs["weight"].clone()}
    options = {"divergence": kind, "teacher_logit_scale": 1 + distance}
    values, grad = evaluate(native, inputs, **options)
    exact, exact_grad = evaluate(reference.linear_divergence, doubled(inputs), **options)
    assert exact.max() < 2 * distance**2
    # The logits, below 8, are off by a few eps each, and their difference by that much of `distance`.
    assert ((values - exact) / exact).abs().max() <= 16 * EPS / distance
    assert (grad - exact_grad).abs().max() <= 16 * EPS / distance * exact_grad.abs().max()


@pytest.mark.parametrize(("kind", "ruled_out_by"), [("forward_kl", "bias"), ("reverse_kl", "teacher_bias")])
def test_entries_that_are_ruled_out(isa, kind, ruled_out_by):
    inputs = problem(bias=True)
    inputs["bias"][:300] = inputs["teacher_bias"][:300] = -math.inf  # the whole first tile, and more
    for both in KINDS:
        values, grad = evaluate(native, inputs, divergence=both)
        exact, exact_grad = evaluate(reference.linear_divergence, doubled(inputs), divergence=both)
        assert (values - exact).abs().max() <= 4 * logit_error(inputs) * exact.max()
        assert (grad - exact_grad).abs().max() <= 8 * logit_error(inputs) * exact_grad.abs().max()
    inputs[ruled_out_by][1000] = -math.inf
    assert (native(**inputs, divergence=kind) == math.inf).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(isa, softcap, kind):
    inputs = {name: t[:7, :4] for name, t in problem(torch.float64).items()}
    mask = torch.arange(7) != 2

    def run(hidden):
        return native(**inputs | {"hidden": hidden}, mask=mask, divergence=kind, softcap=softcap, jsd_beta=0.3)

    torch.autograd.gradcheck(run, inputs["hidden"].clone().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 3.0, 1.0], dtype=torch.float64)])
def test_gradcheck_of_a_trainable_head(isa, weights, kind):
    inputs = {name: t[:7, :4] for name, t in problem(torch.float64, vocab=11).items()}
    leaves = [inputs["hidden"], inputs["weight"], torch.linspace(-1, 1, len(inputs["weight"]), dtype=torch.float64)]

    def run(hidden, weight, bias):
        sides = inputs | {"hidden": hidden, "weight": weight, "bias": bias}
        out = native(**sides, token_weights=weights, divergence=kind, softcap=3.0, jsd_beta=0.3)
        return out if weights is None else out.sum()

    torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in leaves])


@pytest.mark.parametrize("formed", [False, True])
def test_opcheck(isa, formed):
    x, on_cpu = problem(bias=True), {"backend": "cpu"}
    student = (x["hidden"], x["weight"], x["bias"], (1.3, 5.0, 0.7))
    teacher = (x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"], (1.0, 0.0, 0.7))
    rows = torch.arange(N) % 3 != 1, torch.ones(N) if formed else None
    args = (*student, *teacher, *rows, "jsd", 0.3, True, [True, True], 0)
    torch.library.opcheck(torch.ops.fastalign.linear_divergence.default, args, on_cpu)
    *_, stats, weight, bias = torch.ops.fastalign.linear_divergence(*args, **on_cpu)
    args = (torch.ones(N), *student, *teacher, *rows, stats, weight, bias, "jsd", 0.3, [True, True])
    torch.library.opcheck(torch.ops.fastalign.linear_divergence_backward.default, args, on_cpu)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_batch_and_budget_do_not_change_a_row_by_a_bit(isa, threads, dtype, kind):
    inputs, results = problem(dtype, n=230, vocab=5000), []
    for count, budget in ((1, None), (2, None), (8, 0), (2, 5000 * 8 * 60)):
        threads(count)
        results.append(evaluate(native, inputs, divergence=kind, memory_budget=budget))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    for rows in ([0], [229], list(range(200, 90, -7))):
        part = {name: t[rows] if "hidden" in name else t for name, t in inputs.items()}
        part["hidden"].requires_grad_()
        out = native(**part, divergence=kind)
        assert torch.equal(out.detach(), results[0][0][rows])
        weights = torch.linspace(-1, 2, 230)[rows]
        (grad,) = torch.autograd.grad((weights * out).sum(), part["hidden"])
        assert torch.equal(grad, results[0][1][rows])


@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (25, 257), (2, 255), (24, 2048), (500, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_around_the_tiles(isa, kind, n, vocab):
    inputs = problem(n=n, vocab=vocab)
    values, grad = evaluate(native, inputs, divergence=kind)
    exact, exact_grad = evaluate(reference.linear_divergence, doubled(inputs), divergence=kind)
    error = logit_error(inputs)
    assert (values - exact).abs().max() <= 4 * error * exact.max()
    assert (grad - exact_grad).abs().max() <= 8 * error * exact_grad.abs().max()


def test_every_layout_gives_the_same_bits(isa):
    inputs = problem(bias=True)
    expected = evaluate(native, inputs)
    wide = torch.full((N, H + 5), 9.0)
    wide[:, 2 : H + 2] = inputs["hidden"]
    strided = inputs | {
        "teacher_hidden": inputs["teacher_hidden"].t().contiguous().t(),
        "weight": inputs["weight"].repeat_interleave(2, 1)[:, ::2],
        "teacher_weight": inputs["teacher_weight"].repeat_interleave(2, 0)[::2],
        "bias": inputs["bias"].repeat_interleave(2)[::2],
    }
    assert torch.equal(linear_divergence(**strided | {"hidden": wide[:, 2 : H + 2]}, backend="cpu"), expected[0])


def test_no_row_at_all(isa):
    inputs = problem()
    values, grad = evaluate(native, inputs, mask=torch.zeros(N, dtype=torch.bool))
    assert not values.any() and not grad.any()
    inputs["hidden"][3] = math.nan
    values = native(**inputs)
    assert values[3].isnan() and values[torch.arange(N) != 3].isfinite().all()


def test_compiles_in_one_graph_to_the_same_bits():
    inputs = problem()
    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, evaluate(compiled, inputs), evaluate(native, inputs)))


def test_what_it_cannot_run_is_refused_by_name_and_left_to_torch_by_auto():
    inputs = problem()
    mixed = {name: t.bfloat16() if name.startswith("teacher") else t for name, t in inputs.items()}
    with pytest.raises(BackendError, match=r"float32 and torch.bfloat16"):
        native(**mixed)
    assert torch.equal(linear_divergence(**mixed), linear_divergence(**mixed, backend="torch"))
    for trainable in (False, True):
        inputs["weight"].requires_grad_(trainable)
        assert torch.equal(linear_divergence(**inputs), native(**inputs))
