"""linear_divergence against the float64 reference: values, gradients, edges, and what must not depend on what."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from fastalign import linear_divergence, reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.head import tiling

EPS = torch.finfo(torch.float32).eps
N, H, V = 37, 24, 53
G, U = 13, 59  # the teacher's width, and its vocabulary: padded
KINDS = reference.DIVERGENCES
OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": -0.6, "temperature": 1.7, "teacher_logit_scale": 1.2},
    "capped": {"softcap": 3.0, "teacher_softcap": 4.0, "logit_scale": 1.3, "temperature": 0.7},
}
MODES = ("frozen", "trainable", "weighted")  # weighted: trainable, the coefficients known in advance
STUDENT = ("hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Three blocks of rows and four of the vocabulary, the last ones ragged."""
    monkeypatch.setattr(tiling, "divergence_tile_shape", lambda device: (16, 16))


def problem(dtype=torch.float32, *, n=N, bias=False, seed=0) -> dict[str, torch.Tensor]:
    """Random student and teacher, logits of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    out = {
        "hidden": normal(n, H), "weight": normal(V, H) / H**0.5,
        "teacher_hidden": normal(n, G), "teacher_weight": normal(U, G) / G**0.5,
    }  # fmt: skip
    return out | ({"bias": normal(V), "teacher_bias": normal(U)} if bias else {})


def evaluate(function, inputs, mode="frozen", **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Divergences, and the gradients of a fixed weighted sum of them in the student's tensors."""
    inputs = {name: t.detach().clone() for name, t in inputs.items()}
    leaves = [
        inputs[name].requires_grad_() for name in (STUDENT if mode != "frozen" else STUDENT[:1]) if name in inputs
    ]
    coefficients = torch.linspace(-1, 2, inputs["hidden"].shape[:-1].numel()).view(inputs["hidden"].shape[:-1])
    if mode == "weighted" and function is not reference.linear_divergence:
        out = function(**inputs, token_weights=coefficients, **options)
        return out.detach() / coefficients, list(torch.autograd.grad(out.sum(), leaves))
    out = function(**inputs, **options)
    return out.detach(), list(torch.autograd.grad((coefficients * out).sum(), leaves))


def doubled(inputs):
    return {name: t.double() for name, t in inputs.items()}


def assert_within_budget(actual, plain, exact, eps, rounding=0.0):
    """|actual - exact| <= 2 (|plain - exact| + eps max|exact|), where plain is the reference in the low precision."""
    budget = 2 * ((plain - exact).abs().max() + eps * exact.abs().max() + rounding)
    assert (actual - exact).abs().max() <= budget


def check_against_float64(inputs, mode, saturated=False, **options):
    """`saturated`: gradients vanish, but not the rounding of what they are differences of: s, t and s log(s / m), of
    order 1, which are multiplied by the weight, the hidden states, or nothing."""
    values, grads = evaluate(linear_divergence, inputs, mode, backend="torch", **options)
    plain_values, plain_grads = evaluate(reference.linear_divergence, inputs, mode, **options)
    exact_values, exact_grads = evaluate(reference.linear_divergence, doubled(inputs), mode, **options)
    dtype = inputs["hidden"].dtype
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [g.dtype for g in grads] == [dtype] * len(grads)
    # Of float64 the reference is no truer than this: H rounded additions make a logit or a gradient.
    eps = torch.finfo(dtype).eps * (H if dtype == torch.float64 else 1)
    assert_within_budget(values, plain_values, exact_values, min(eps, EPS))
    factors = [inputs["weight"].abs().max(), inputs["hidden"].abs().max(), 1.0]
    for actual, plain, exact, factor in zip(grads, plain_grads, exact_grads, factors, strict=False):
        assert_within_budget(actual, plain, exact, eps, eps * factor if saturated else 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_error_budget(option, dtype, mode, kind):
    check_against_float64(problem(dtype, bias=True), mode, divergence=kind, jsd_beta=0.3, **OPTIONS[option])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_logits_up_to_60(mode, kind):
    """Nearly one-hot on both sides, and far apart."""
    inputs = problem()
    for side in ("", "teacher_"):
        z = inputs[f"{side}hidden"] @ inputs[f"{side}weight"].t()
        inputs[f"{side}hidden"] *= 60 / z.abs().max()
    check_against_float64(inputs, mode, saturated=True, divergence=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_distant_teacher_stays_finite(kind):
    """Logits of +-200: exponentials over- and underflow, their ratio too."""
    inputs = problem(bias=True)
    inputs["bias"][:] = torch.linspace(-200, 200, V)
    inputs["teacher_bias"][:] = torch.linspace(200, -200, U)
    check_against_float64(inputs, "trainable", saturated=True, divergence=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient(option, mode, kind):
    options = {k: v for k, v in OPTIONS[option].items() if not k.startswith("teacher")}
    options |= {f"teacher_{k}": v for k, v in options.items() if k != "temperature"}
    inputs = problem(bias=True)
    inputs |= {f"teacher_{name}": inputs[name].clone() for name in STUDENT}
    values, grads = evaluate(linear_divergence, inputs, mode, divergence=kind, backend="torch", **options)
    assert not values.nan_to_num().any()  # the coefficients of "weighted" hold no 0, so 0 / c is 0
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_small_divergences_keep_their_digits(distance, kind):
    """A teacher `distance` away: the divergence is of the order of its square, and lost if terms cancel."""
    inputs = problem()
    inputs |= {"teacher_hidden": inputs["hidden"].clone(), "teacher_weight": inputs["weight"].clone()}
    options = {"divergence": kind, "teacher_logit_scale": 1 + distance}
    values, (grad,) = evaluate(linear_divergence, inputs, backend="torch", **options)
    exact, (exact_grad,) = evaluate(reference.linear_divergence, doubled(inputs), **options)
    assert exact.max() < 2 * distance**2
    # The logits, below 8, are off by a few eps each, and their difference by that much of `distance`.
    assert ((values - exact) / exact).abs().max() <= 16 * EPS / distance
    assert (grad - exact_grad).abs().max() <= 16 * EPS / distance * exact_grad.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["frozen", "trainable"])
def test_entries_that_both_sides_rule_out(mode, kind):
    inputs = problem(bias=True)
    inputs["bias"][:18] = inputs["bias"][40] = -math.inf  # the whole first tile, and more
    inputs["teacher_bias"][:18] = inputs["teacher_bias"][40] = -math.inf
    check_against_float64(inputs, mode, divergence=kind)
    _, grads = evaluate(linear_divergence, inputs, mode, divergence=kind, backend="torch")
    assert mode == "frozen" or not grads[1][:18].any()


@pytest.mark.parametrize(("kind", "ruled_out_by"), [("forward_kl", "bias"), ("reverse_kl", "teacher_bias")])
def test_a_kl_is_infinite_where_the_second_distribution_rules_out_what_the_first_allows(kind, ruled_out_by):
    inputs = problem(bias=True)
    inputs[ruled_out_by][7] = -math.inf
    for backend in ("torch", "reference"):
        assert (linear_divergence(**inputs, divergence=kind, backend=backend) == math.inf).all()
        assert linear_divergence(**inputs, divergence="jsd", backend=backend).isfinite().all()
    other = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl"}[kind]
    check_against_float64(inputs, "trainable", divergence=other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap, mode, kind, monkeypatch):
    monkeypatch.setattr(tiling, "divergence_tile_shape", lambda device: (16, 3))
    generator = torch.Generator().manual_seed(1)
    h, w, b, th, tw = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 4), (7, 4), (7,), (5, 3), (7, 3))
    )
    mask = torch.tensor([True, True, False, True, True])
    leaves = [h.requires_grad_(), w.requires_grad_(mode != "frozen"), b.requires_grad_(mode != "frozen")]

    def run(hidden, weight, bias):
        out = linear_divergence(
            hidden, weight, th, tw, bias=bias, mask=mask, divergence=kind, softcap=softcap, temperature=0.8,
            jsd_beta=0.3, backend="torch", token_weights=torch.linspace(0.5, 2, 5) if mode == "weighted" else None,
        )  # fmt: skip
        return out.sum() if mode == "weighted" else out

    torch.autograd.gradcheck(run, leaves)


def test_token_weights_are_right_whatever_becomes_of_the_result():
    """The gradient formed in advance fits a sum only; any other use forms it again."""
    inputs = problem(torch.float64, bias=True)
    weights, use = torch.linspace(0, 1, N), torch.linspace(-2, 1, N)
    grads = []
    for backend in ("torch", "reference"):
        leaves = {name: t.clone().requires_grad_(name in STUDENT) for name, t in inputs.items()}
        out = linear_divergence(**leaves, token_weights=weights, backend=backend)
        grads.append(torch.autograd.grad((use * out).sum(), [leaves[name] for name in STUDENT]))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_are_zero_and_touch_nothing(kind, mode):
    inputs, mask = problem(bias=True), torch.arange(N) % 3 != 1
    inputs["hidden"][~mask] = inputs["teacher_hidden"][~mask] = math.nan
    values, grads = evaluate(linear_divergence, inputs, mode, divergence=kind, mask=mask, backend="torch")
    assert (values[~mask] == 0).all() and (values[mask] > 0).all() and not grads[0][~mask].any()
    clean = {name: t.nan_to_num() for name, t in inputs.items()}
    exact, exact_grads = evaluate(reference.linear_divergence, doubled(clean), mode, divergence=kind, mask=mask)
    for actual, truth in zip([values, *grads], [exact, *exact_grads], strict=True):
        assert (actual - truth).abs().max() <= 64 * EPS * truth.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [N, 0])
def test_no_row_at_all(rows, mode):
    inputs = problem(n=rows)
    mask = torch.zeros(rows, dtype=torch.bool)
    values, grads = evaluate(linear_divergence, inputs, mode, mask=mask, backend="torch")
    assert values.shape == (rows,) and not values.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("side", ["bias", "teacher_bias"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_side_without_any_entry_has_no_divergence(kind, temperature, side, backend):
    """Every logit is -inf there. The kernels hold -inf as a finite number, which would be a uniform distribution."""
    inputs, mask = problem(bias=True), torch.arange(N) % 3 != 1
    inputs[side] = torch.full_like(inputs[side], -math.inf)
    inputs["hidden"].requires_grad_()
    values = linear_divergence(**inputs, divergence=kind, mask=mask, temperature=temperature, backend=backend)
    assert values[mask].isnan().all() and (values[~mask] == 0).all()
    (grad,) = torch.autograd.grad(values.sum(), inputs["hidden"])
    assert grad[mask].isnan().all() and not grad[~mask].any()
    capped = linear_divergence(**inputs, divergence=kind, mask=mask, softcap=3.0, teacher_softcap=3.0, backend=backend)
    exact = reference.linear_divergence(**inputs, divergence=kind, mask=mask, softcap=3.0, teacher_softcap=3.0)
    torch.testing.assert_close(capped, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_scale_is_no_reason_for_nan(kind, backend):
    inputs = problem(bias=True)
    options = {"divergence": kind, "logit_scale": -0.6, "teacher_logit_scale": -0.6}
    exact = reference.linear_divergence(**inputs, **options)
    torch.testing.assert_close(linear_divergence(**inputs, **options, backend=backend), exact, rtol=1e-4, atol=1e-5)
    inputs["bias"][3] = -math.inf  # an infinite logit under a negative scale
    assert linear_divergence(**inputs, **options, backend=backend).isnan().all()


def test_a_weight_of_zero_drops_the_row():
    inputs = problem()
    inputs["hidden"][3] = math.nan
    weights = torch.ones(N)
    weights[3] = 0.0
    out = linear_divergence(**inputs, token_weights=weights, backend="torch")
    assert out[3] == 0 and out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_batch_and_the_budget_do_not_change_a_row_by_a_bit(threads, kind, monkeypatch):
    monkeypatch.undo()  # real tiles
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(230, 40, generator=generator), torch.randn(2500, 40, generator=generator) / 6
    th, tw = torch.randn(230, 24, generator=generator), torch.randn(2500, 24, generator=generator) / 5

    def run(rows, memory_budget=None):
        hidden = h[rows].requires_grad_()
        out = linear_divergence(
            hidden, w, th[rows], tw, divergence=kind, backend="torch", memory_budget=memory_budget
        )  # fmt: skip
        return out.detach(), *torch.autograd.grad(out.sum(), hidden)

    whole = run(list(range(230)))
    parts = [([0], None), ([229], 0), (list(range(200, 90, -7)), None), (list(range(230)), 48 * 2500 * 8)]
    for rows, budget in parts:
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, run(rows, budget), strict=True))
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
def test_leading_dimensions_layouts_and_mixed_dtypes(mode):
    flat = problem(torch.float64, n=12, bias=True)
    batched = {name: t.view(3, 4, -1) if "hidden" in name else t for name, t in flat.items()}
    batched["weight"] = batched["weight"].t().contiguous().t()
    batched["teacher_weight"] = batched["teacher_weight"].repeat_interleave(2, 0)[::2]
    expected, expected_grads = evaluate(linear_divergence, flat, mode, backend="torch")
    values, grads = evaluate(linear_divergence, batched, mode, backend="torch")
    torch.testing.assert_close(values, expected.view(3, 4), rtol=1e-13, atol=1e-15)
    for actual, truth in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual.reshape(truth.shape), truth, rtol=1e-12, atol=1e-15)
    mixed = problem() | {"teacher_hidden": problem(torch.bfloat16)["teacher_hidden"]}
    assert linear_divergence(**mixed, backend="torch").dtype == torch.float32
    mixed = problem() | {"teacher_weight": problem(torch.float64)["teacher_weight"]}
    assert linear_divergence(**mixed, backend="torch").dtype == torch.float64


def test_the_vocabulary_that_both_share_counts():
    inputs = problem(torch.float64, bias=True)
    weight, bias = inputs["weight"].requires_grad_(), inputs["bias"].requires_grad_()
    cut = inputs | {"teacher_weight": inputs["teacher_weight"][:V], "teacher_bias": inputs["teacher_bias"][:V]}
    assert torch.equal(linear_divergence(**inputs, backend="torch"), linear_divergence(**cut, backend="torch"))
    short = inputs | {"teacher_weight": inputs["teacher_weight"][:40], "teacher_bias": inputs["teacher_bias"][:40]}
    for token_weights in (None, torch.ones(N)):
        out = linear_divergence(**short, token_weights=token_weights, backend="torch")
        for grad in torch.autograd.grad(out.sum(), [weight, bias]):
            assert grad.shape[0] == V and grad[:40].all() and not grad[40:].any()


def test_the_teacher_gets_no_gradient():
    inputs = {name: t.requires_grad_() for name, t in problem(bias=True).items()}
    for backend in ("torch", "reference"):
        out = linear_divergence(**inputs, backend=backend).sum()
        teacher = [t for name, t in inputs.items() if name.startswith("teacher")]
        assert torch.autograd.grad(out, teacher, allow_unused=True) == (None, None, None)


def test_autocast_does_not_touch_the_logits():
    inputs = problem()
    expected = evaluate(linear_divergence, inputs, "trainable", backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(linear_divergence, inputs, "trainable", backend="torch")
    assert all(map(torch.equal, [found[0], *found[1]], [expected[0], *expected[1]]))


def test_no_grad_and_frozen_inputs_need_no_graph():
    inputs = problem()
    assert not linear_divergence(**inputs).requires_grad
    inputs["hidden"].requires_grad_()
    with torch.no_grad():
        assert not linear_divergence(**inputs).requires_grad


def test_second_derivatives_are_refused_not_wrong():
    inputs = problem()
    (grad,) = torch.autograd.grad(
        linear_divergence(**inputs | {"hidden": inputs["hidden"].requires_grad_()}, backend="torch").square().sum(),
        inputs["hidden"], create_graph=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_compiles_in_one_graph_to_the_same_bits(mode):
    inputs, mask = problem(bias=True), torch.arange(N) % 3 != 1

    def run(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, token_weights=None):
        return linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, bias=bias, teacher_bias=teacher_bias, mask=mask,
            token_weights=token_weights, divergence="jsd", backend="torch",
        )  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (values, grads), (expected, expected_grads) = (evaluate(f, inputs, mode) for f in (compiled, run))
    assert all(map(torch.equal, [values, *grads], [expected, *expected_grads]))


@pytest.mark.parametrize("formed", [False, True])
def test_opcheck(formed):
    x = problem(bias=True)
    student = (x["hidden"], x["weight"], x["bias"], (1.3, 5.0, 0.7))
    teacher = (x["teacher_hidden"], x["teacher_weight"], x["teacher_bias"], (1.0, 0.0, 0.7))
    rows = torch.arange(N) % 3 != 1, torch.ones(N) if formed else None
    args = (*student, *teacher, *rows, "jsd", 0.3, True, [True, True], 0)
    torch.library.opcheck(torch.ops.fastalign.linear_divergence.default, args)
    *_, stats, weight, bias = torch.ops.fastalign.linear_divergence(*args)
    args = (torch.ones(N), *student, *teacher, *rows, stats, weight, bias, "jsd", 0.3, [True, True])
    torch.library.opcheck(torch.ops.fastalign.linear_divergence_backward.default, args)


WRONG = {
    "hidden is integer": ({"hidden": torch.ones(N, H).long()}, "hidden is torch.int64", "floating", "dequantise"),
    "teacher is quantised": ({"teacher_weight": torch.ones(U, G).char()}, "teacher_weight is torch.int8", "dequantise"),
    "widths differ": ({"teacher_weight": torch.ones(U, H)}, "teacher_hidden is (37, 13)", "(59, 24)", "(V, H)"),
    "tokens differ": ({"teacher_hidden": torch.ones(N + 1, G)}, "teacher_hidden is (38, 13)", "(37,)"),
    "bias is short": ({"bias": torch.ones(V - 1)}, "bias is (52,)", "(53,)"),
    "teacher bias is integer": ({"teacher_bias": torch.ones(U).long()}, "teacher_bias", "torch.int64", "floating"),
    "mask is long": ({"mask": torch.ones(N).long()}, "mask is torch.int64", "bool", "mask != 0"),
    "mask is short": ({"mask": torch.ones(3).bool()}, "mask is (3,)", "(37,)"),
    "weights are short": ({"token_weights": torch.ones(3)}, "token_weights is (3,)", "(37,)"),
    "weights are integer": ({"token_weights": torch.ones(N).long()}, "token_weights is torch.int64", ".float()"),
    "unknown divergence": ({"divergence": "tv"}, "'tv'", "forward_kl, reverse_kl, jsd"),
    "temperature is 0": ({"temperature": 0.0}, "temperature is 0.0", "above 0"),
    "softcap is 0": ({"teacher_softcap": 0.0}, "teacher_softcap is 0.0", "above 0", "None"),
    "jsd_beta is 1": ({"divergence": "jsd", "jsd_beta": 1.0}, "jsd_beta is 1.0", "use forward_kl or reverse_kl"),
    "budget is -1": ({"memory_budget": -1}, "memory_budget is -1", "bytes", "0"),
    "devices differ": ({"teacher_weight": torch.ones(U, G, device="meta")}, "cpu", "meta", "one device"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_was_found_and_what_to_do(name):
    arguments, *words = WRONG[name]
    with pytest.raises(InputError) as error:
        linear_divergence(**problem(bias=True) | arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("towards", "end"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_over_the_smaller_share_nears_the_kl_that_its_error_names(towards, end):
    inputs, small = problem(torch.float64), 1e-6
    found = linear_divergence(**inputs, divergence="jsd", jsd_beta=abs(towards - small)) / small
    expected = linear_divergence(**inputs, divergence=end)
    assert ((found - expected).abs() <= 1e-4 * expected).all()  # what is left is of the order of the share


def test_unknown_backend_lists_the_known():
    with pytest.raises(BackendError, match=r"'tpu'.*auto, reference, torch, cpu"):
        linear_divergence(**problem(), backend="tpu")


@pytest.mark.parametrize("weighted", [False, True], ids=["masked", "weighted"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_while_a_graph_is_captured_ignored_rows_stay_and_count_nothing(trainable, weighted, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher, teacher_weight = (torch.randn(n, 8, generator=generator) for n in (21, 40, 21, 40))
    mask, weights = torch.arange(21) % 3 > 0, torch.rand(21, generator=generator)
    weights[4] = 0.0
    hidden[~mask] = math.nan

    def evaluate():
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
        out = linear_divergence(
            *leaves, teacher, teacher_weight, mask=mask, token_weights=weights if weighted else None, backend="torch"
        )
        out.sum().backward()
        return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]

    expected = evaluate()
    for module in ("fastalign.ops.linear_divergence", "fastalign.ops.head.rows"):
        monkeypatch.setattr(importlib.import_module(module), "is_capturing", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # what would wait for the GPU
    monkeypatch.setattr(torch.Tensor, "__bool__", None)
    got = evaluate()
    monkeypatch.undo()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
