"""sparse_logits_divergence against the float64 reference, and beside sparse_divergence: values, gradients, edges."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import reference, sparse_divergence, sparse_logits_divergence
from fastalign.errors import BackendError, InputError
from fastalign.ops.head import tiling

N, V, K = 37, 53, 6
KINDS = reference.DIVERGENCES


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tiling, "LOGITS_AT_A_TIME", 10 * V)


def problem(dtype=torch.float32, *, n=N, k=K, spread=2.0, seed=0) -> dict[str, torch.Tensor]:
    """Random student logits, and the top k of a random teacher."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (torch.randn(n, V, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    top = teacher.log_softmax(-1).topk(k)
    return {"student_logits": logits.to(dtype), "teacher_indices": top.indices, "teacher_logprobs": top.values.float()}


def evaluate(function, inputs, **options):
    inputs = inputs | {"student_logits": inputs["student_logits"].detach().clone().requires_grad_()}
    out = function(**inputs, **options)
    weights = torch.linspace(-1, 2, out.numel()).view(out.shape)
    return out.detach(), *torch.autograd.grad((weights * out).sum(), inputs["student_logits"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["lump", "drop"])
@pytest.mark.parametrize("spread", [2.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(dtype, spread, tail, kind):
    """|ours - exact| <= 2 (|plain - exact| + eps max|exact|), where plain is the reference in the low precision."""
    inputs = problem(dtype, spread=spread)
    options = {"divergence": kind, "tail": tail, "temperature": 1.3, "jsd_beta": 0.3}
    found = evaluate(sparse_logits_divergence, inputs, **options)
    plain = evaluate(reference.sparse_logits_divergence, inputs, **options)
    doubled = inputs | {"student_logits": inputs["student_logits"].double()}
    exact = evaluate(reference.sparse_logits_divergence, doubled, **options)
    for i, (ours, low, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert ours.dtype == (dtype if i else torch.float32)
        eps = torch.finfo(ours.dtype).eps
        assert (ours - truth).abs().max() <= 2 * ((low - truth).abs().max() + eps * truth.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["lump", "drop"])
def test_gradcheck(tail, kind):
    inputs = problem(torch.float64, n=5)
    logits, mask = inputs.pop("student_logits"), torch.arange(5) != 2

    def run(logits):
        return sparse_logits_divergence(logits, **inputs, mask=mask, divergence=kind, tail=tail, temperature=0.8)

    torch.autograd.gradcheck(run, logits.clone().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, K, V])
def test_it_is_sparse_divergence_of_the_same_logits(k, kind):
    inputs = problem(torch.float64, k=k)
    logits = inputs["student_logits"]
    teacher = {name: t for name, t in inputs.items() if name != "student_logits"}
    same = sparse_divergence(logits, torch.eye(V, dtype=torch.float64), **teacher, divergence=kind, temperature=0.7)
    found = sparse_logits_divergence(**inputs, divergence=kind, temperature=0.7)
    torch.testing.assert_close(found, same, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rows_that_do_not_count_are_zero(backend):
    inputs, mask, weights = problem(), torch.arange(N) % 3 != 1, torch.linspace(-1, 2, N)
    weights[3] = 0.0
    kept = mask & (weights != 0)
    values, grad = evaluate(sparse_logits_divergence, inputs, backend=backend)
    if backend == "torch":
        inputs["student_logits"][~kept], inputs["teacher_indices"][~kept] = math.nan, -100
    found = evaluate(sparse_logits_divergence, inputs, mask=mask, token_weights=weights.double(), backend=backend)
    assert torch.equal(found[0], torch.where(kept, values * weights, 0.0))
    torch.testing.assert_close(found[1], torch.where(kept[:, None], grad * weights[:, None], 0.0), rtol=1e-5, atol=1e-9)


def test_entries_that_are_ruled_out_and_no_rows():
    inputs = problem()
    inputs["student_logits"][:, 5] = -math.inf
    inputs["teacher_indices"][:, 0] = 5
    inputs["teacher_indices"][:, 1:] = torch.arange(10, 10 + K - 1)
    assert (sparse_logits_divergence(**inputs) > 1e9).all()
    assert sparse_logits_divergence(**inputs, divergence="jsd").isfinite().all()
    empty = {name: t[:0].view(2, 0, t.shape[1]) for name, t in inputs.items()}
    assert sparse_logits_divergence(**empty).shape == (2, 0)


def test_compiles_in_one_graph():
    inputs = problem()
    compiled = torch.compile(sparse_logits_divergence, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, evaluate(compiled, inputs), evaluate(sparse_logits_divergence, inputs)))


def test_opcheck():
    inputs, mask = problem(), torch.arange(N) % 3 != 1
    args = inputs["student_logits"], inputs["teacher_indices"], mask
    torch.library.opcheck(torch.ops.fastalign.topk_logprobs.default, (*args, 0.7))
    found = torch.ops.fastalign.topk_logprobs(*args, 0.7)
    torch.library.opcheck(
        torch.ops.fastalign.topk_logprobs_backward.default, (torch.ones_like(found[0]), *args, *found, 0.7)
    )


WRONG = {
    "logits are integer": ({"student_logits": torch.ones(N, V).long()}, "student_logits is torch.int64", "floating"),
    "indices are outside": ({"teacher_indices": torch.arange(K).repeat(N, 1) + V - 3}, "holds 53", "[0, 53)"),
    "indices repeat": ({"teacher_indices": torch.zeros(N, K).long()}, "twice in one row", "distinct"),
    "rows are fewer": ({"student_logits": torch.zeros(3, V)}, "(37, 6)", "(3, 'k')"),
    "mask is long": ({"mask": torch.ones(N).long()}, "mask is torch.int64", "bool"),
    "tail is unknown": ({"tail": "cut"}, "'cut'", "lump or drop"),
    "temperature is 0": ({"temperature": 0.0}, "temperature is 0.0", "above 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_was_found_and_what_to_do(name):
    arguments, *words = WRONG[name]
    with pytest.raises(InputError) as error:
        sparse_logits_divergence(**problem() | arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_backend_lists_the_known():
    with pytest.raises(BackendError, match=r"'tpu'.*auto, reference, torch"):
        sparse_logits_divergence(**problem(), backend="tpu")


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.7])
def test_a_row_without_any_entry_has_no_divergence(temperature):
    logits = torch.randn(3, 5)
    logits[0], logits[1] = -torch.inf, torch.finfo(torch.float32).min
    leaf = logits.requires_grad_()
    entries, logprobs = torch.tensor([[0], [0], [1]]), torch.full((3, 1), -0.5)
    values = sparse_logits_divergence(leaf, entries, logprobs, temperature=temperature)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    assert values[0].isnan() and grad[0].isnan().all() and values[1:].isfinite().all() and grad[1:].isfinite().all()
