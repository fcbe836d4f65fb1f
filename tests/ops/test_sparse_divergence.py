"""sparse_divergence against the float64 reference: values, gradients, tails, edges, and what it costs."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastalign import linear_divergence, reference, sparse_divergence
from fastalign.errors import BackendError, InputError
from fastalign.ops.head import tiling

op = sys.modules["fastalign.ops.sparse_divergence"]  # the name in fastalign.ops is the function's
EPS = torch.finfo(torch.float32).eps
N, H, V, K = 37, 24, 53, 6
KINDS = reference.DIVERGENCES
OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": -0.6, "temperature": 1.7},
    "capped": {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.7},
    "drop": {"tail": "drop"},
}
LEAVES = ("hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Three blocks of rows and four of the vocabulary, the last ones ragged."""
    monkeypatch.setattr(tiling, "divergence_tile_shape", lambda device: (16, 16))


def problem(dtype=torch.float32, *, n=N, k=K, teacher_spread=2.0, seed=0) -> dict[str, torch.Tensor]:
    """Random student, logits of standard deviation 1, and the top k of a random teacher."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    top = (normal(n, V) * teacher_spread).log_softmax(-1).topk(k)
    return {
        "hidden": normal(n, H).to(dtype), "weight": (normal(V, H) / H**0.5).to(dtype), "bias": normal(V).to(dtype),
        "teacher_indices": top.indices, "teacher_logprobs": top.values.float(),
    }  # fmt: skip


def evaluate(function, inputs, frozen=False, **options):
    inputs = {name: t.detach().clone() for name, t in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in (LEAVES[:1] if frozen else LEAVES)]
    out = function(**inputs, **options)
    weights = torch.linspace(-1, 2, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((weights * out).sum(), leaves)]


def doubled(inputs):
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def check_against_float64(inputs, frozen, **options):
    """|ours - exact| <= 2 (|plain - exact| + eps max|exact|), where plain is the reference in the low precision."""
    found = evaluate(sparse_divergence, inputs, frozen, backend="torch", **options)
    plain = evaluate(reference.sparse_divergence, inputs, frozen, **options)
    exact = evaluate(reference.sparse_divergence, doubled(inputs), frozen, **options)
    dtype = inputs["hidden"].dtype
    eps = torch.finfo(dtype).eps * (H if dtype == torch.float64 else 1)
    for i, (ours, low, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert ours.dtype == (dtype if i else reference.compute_dtype(inputs["hidden"]))
        budget = 2 * ((low - truth).abs().max() + (eps if i else min(eps, EPS)) * truth.abs().max())
        assert (ours - truth).abs().max() <= budget, f"output {i}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_error_budget(option, dtype, frozen, kind):
    check_against_float64(problem(dtype), frozen, divergence=kind, jsd_beta=0.3, **OPTIONS[option])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["lump", "drop"])
def test_gradcheck(tail, kind, monkeypatch):
    monkeypatch.setattr(tiling, "divergence_tile_shape", lambda device: (16, 3))
    x = {name: t[:5] if name not in ("weight", "bias") else t for name, t in problem(torch.float64, k=3).items()}
    mask = torch.tensor([True, True, False, True, True])

    def run(hidden, weight, bias):
        teacher = (x["teacher_indices"] % 11, x["teacher_logprobs"])
        return sparse_divergence(
            hidden, weight, *teacher, bias=bias, mask=mask, divergence=kind, tail=tail, softcap=3.0, temperature=0.8,
            backend="torch",
        )  # fmt: skip

    x["teacher_indices"][:] = torch.tensor([[0, 4, 10], [3, 2, 1], [0, 1, 2], [9, 8, 5], [6, 7, 0]])
    leaves = [x["hidden"][:, :4], x["weight"][:11, :4], x["bias"][:11]]
    torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in leaves])


@pytest.mark.parametrize("kind", KINDS)
def test_all_entries_make_the_whole_divergence(kind):
    x = problem(torch.float64, k=V)
    x["teacher_logprobs"] = x["teacher_logprobs"].double().log_softmax(-1)
    logits = torch.zeros(N, V, dtype=torch.float64).scatter(1, x["teacher_indices"], x["teacher_logprobs"])
    identity = torch.eye(V, dtype=torch.float64)
    whole = linear_divergence(x["hidden"], x["weight"], logits, identity, bias=x["bias"], divergence=kind)
    for tail in ("lump", "drop"):
        found = sparse_divergence(**x, divergence=kind, tail=tail, backend="torch")
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_lumping_loses_and_more_entries_lose_less(kind):
    """The data processing inequality: a divergence over coarser buckets is smaller."""
    values = [sparse_divergence(**problem(torch.float64, k=k), divergence=kind, backend="torch") for k in (2, 8, V - 1)]
    assert (values[0] <= values[1]).all() and (values[1] <= values[2]).all() and (values[0] >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient(kind):
    x = problem(torch.float64)
    z = reference.linear_logits(x["hidden"], x["weight"], bias=x["bias"])
    top = z.log_softmax(-1).topk(K)
    x |= {"teacher_indices": top.indices, "teacher_logprobs": top.values}
    for found in evaluate(sparse_divergence, x, divergence=kind, backend="torch"):
        assert found.abs().max() < 1e-14


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("confident_in", ["top", "tail"])
def test_nearly_all_mass_on_either_side(confident_in, kind):
    """A tail of e^-60, or top entries of e^-60 each: neither may come from 1 minus the other."""
    x = problem()
    x["bias"] = torch.zeros(V)
    x["bias"][: V // 2] = 60.0 if confident_in == "top" else -60.0
    x["teacher_indices"] = torch.arange(K).repeat(N, 1) * (V // 2 // K)
    x["bias"][x["teacher_indices"][0]] *= 1.5
    found = evaluate(sparse_divergence, x, divergence=kind, backend="torch")
    exact = evaluate(reference.sparse_divergence, doubled(x), divergence=kind)
    for ours, truth in zip(found, exact, strict=True):
        assert (ours - truth).abs().max() <= 100 * 8 * EPS * max(1.0, truth.abs().max())


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_masked_rows_are_zero_and_touch_nothing(frozen):
    x, mask = problem(torch.float64), torch.arange(N) % 3 != 1
    exact = evaluate(reference.sparse_divergence, x, frozen, mask=mask)
    x["hidden"][~mask] = math.nan
    found = evaluate(sparse_divergence, x, frozen, mask=mask, backend="torch")
    assert (found[0][~mask] == 0).all() and not found[1][~mask].any()
    for ours, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)
    weights = mask.double()
    again = sparse_divergence(**x, token_weights=2 * weights, backend="torch")
    assert torch.equal(again, 2 * found[0])


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_student_without_any_entry_has_no_divergence(backend):
    x = problem()
    x["bias"] = torch.full((V,), -math.inf)
    assert sparse_divergence(**x, backend=backend).isnan().all()


@pytest.mark.parametrize("rows", [N, 1, 0])
def test_few_rows_or_none(rows):
    x = problem(n=rows)
    found = evaluate(sparse_divergence, x, mask=torch.zeros(rows, dtype=torch.bool), backend="torch")
    assert found[0].shape == (rows,) and not any(t.any() for t in found)
    if rows == 1:
        check_against_float64(x, False)


def test_missing_entries_of_a_row_add_nothing():
    x = problem(torch.float64)
    x["teacher_logprobs"][:, -1] = -math.inf
    found = evaluate(sparse_divergence, x, backend="torch")
    assert all(t.isfinite().all() for t in found)
    expected = evaluate(reference.sparse_divergence, x)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)


def test_the_batch_does_not_change_a_row_by_a_bit(monkeypatch):
    monkeypatch.undo()  # real tiles
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(230, 40, generator=generator), torch.randn(5000, 40, generator=generator) / 6
    top = (torch.randn(230, 5000, generator=generator) * 3).log_softmax(-1).topk(8)

    def run(rows):
        hidden = h[rows].requires_grad_()
        out = sparse_divergence(hidden, w, top.indices[rows], top.values[rows], backend="torch")
        return out.detach(), *torch.autograd.grad(out.sum(), hidden)

    whole = run(list(range(230)))
    for rows in ([0], [229], list(range(200, 90, -7))):
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, run(rows), strict=True))


def _addmm_flop(acc_shape, a_shape, b_shape, *args, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@pytest.mark.parametrize(("leaves", "products"), [("", 1), ("hidden", 2), ("hidden weight", 4), ("hidden bias", 3)])
def test_products_are_those_that_the_docstring_states(leaves, products, monkeypatch):
    """As the op's formula declares them, and as the driver's two loops really run them."""
    ran = []

    def counted(function):
        def run(*args):
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as counter:
                out = function(*args)
            ran.append(counter.get_total_flops())
            return out

        return run

    monkeypatch.setattr(op, "_fold_vocabulary", counted(op._fold_vocabulary))
    monkeypatch.setattr(op, "_head_gradients", counted(op._head_gradients))
    x = problem(n=48)
    for name in leaves.split():
        x[name].requires_grad_()
    with FlopCounterMode(display=False) as declared:
        out = sparse_divergence(**x, backend="torch")
        if leaves:
            out.sum().backward()
    assert declared.get_total_flops() == sum(ran) == products * 2 * 48 * V * H


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_compiles_in_one_graph_to_the_same_bits(frozen):
    x, mask = problem(), torch.arange(N) % 3 != 1

    def run(hidden, weight, bias, teacher_indices, teacher_logprobs):
        return sparse_divergence(
            hidden, weight, teacher_indices, teacher_logprobs, bias=bias, mask=mask, backend="torch"
        )  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, evaluate(compiled, x, frozen), evaluate(run, x, frozen)))


def test_opcheck():
    x, mask = problem(), torch.arange(N) % 3 != 1
    args = (x["hidden"], x["weight"], x["bias"], x["teacher_indices"], mask, (1.3, 5.0, 0.7))
    torch.library.opcheck(torch.ops.fastalign.linear_topk_logprobs.default, (*args, True))
    logprobs, *rest = torch.ops.fastalign.linear_topk_logprobs(*args, True)
    args = (torch.ones_like(logprobs), *args[:5], logprobs, *rest, args[5], [True, True, True])
    torch.library.opcheck(torch.ops.fastalign.linear_topk_logprobs_backward.default, args)


WRONG = {
    "indices are int32": ({"teacher_indices": torch.zeros(N, K).int()}, "torch.int32", "int64", ".long()"),
    "indices are outside": ({"teacher_indices": torch.arange(K).repeat(N, 1) + V - 3}, "holds 53", "[0, 53)"),
    "indices repeat": ({"teacher_indices": torch.zeros(N, K).long()}, "twice in one row", "distinct"),
    "log-probs are fewer": ({"teacher_logprobs": torch.zeros(N, 2)}, "(37, 2)", "(37, 'k')"),
    "log-probs are integer": ({"teacher_logprobs": torch.zeros(N, K).long()}, "torch.int64", "float()"),
    "rows are fewer": ({"hidden": torch.zeros(3, H)}, "(37, 6)", "(3, 'k')"),
    "mask is long": ({"mask": torch.ones(N).long()}, "mask is torch.int64", "bool"),
    "tail is unknown": ({"tail": "cut"}, "'cut'", "lump or drop"),
    "divergence is unknown": ({"divergence": "tv"}, "'tv'", "forward_kl"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_was_found_and_what_to_do(name):
    arguments, *words = WRONG[name]
    with pytest.raises(InputError) as error:
        sparse_divergence(**problem() | arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_backend_lists_the_known():
    with pytest.raises(BackendError, match=r"'tpu'.*auto, reference, torch"):
        sparse_divergence(**problem(), backend="tpu")


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("vocab", [1, 2, 5])
def test_a_teacher_that_names_every_entry_leaves_no_tail(backend, vocab):
    """The mean of the weight over an empty tail is 0: divided by the smallest float it was 0 times infinity."""
    hidden, weight = torch.full((1, 1), 3.0, requires_grad=True), torch.linspace(5, -5, vocab).unsqueeze(1)
    entries = torch.arange(vocab).unsqueeze(0)
    teacher = torch.full((1, vocab), 1 / vocab).log()
    values = sparse_divergence(hidden, weight, entries, teacher, temperature=0.1, backend=backend)
    (grad,) = torch.autograd.grad(values.sum(), hidden)
    wide = hidden.detach().double().requires_grad_()
    exact = reference.sparse_divergence(wide, weight.double(), entries, teacher.double(), temperature=0.1)
    (expected,) = torch.autograd.grad(exact.sum(), wide)
    assert (values - exact).abs().max() <= 1e-5 * exact.abs().max().clamp(min=1)
    assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
