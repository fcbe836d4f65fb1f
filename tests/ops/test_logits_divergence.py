"""logits_divergence against the float64 reference: values, gradients, in place, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import logits_divergence, reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.head import tiling

EPS = torch.finfo(torch.float32).eps
N, V = 37, 53
KINDS = reference.DIVERGENCES


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tiling, "LOGITS_AT_A_TIME", 10 * V)


def problem(dtype=torch.float32, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(N, V, generator=generator, dtype=torch.float64) * spread).to(dtype) for _ in range(2))


def evaluate(function, student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    out = function(student, teacher, **options)
    weights = torch.linspace(-1, 2, out.numel()).view(out.shape)
    return out.detach(), *torch.autograd.grad((weights * out).sum(), student)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [2.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(dtype, spread, kind):
    """|ours - exact| <= 2 (|plain - exact| + eps max|exact|), where plain is the reference in the low precision."""
    logits, options = problem(dtype, spread), {"divergence": kind, "temperature": 1.3, "jsd_beta": 0.3}
    found = evaluate(logits_divergence, *logits, **options)
    plain = evaluate(reference.logits_divergence, *logits, **options)
    exact = evaluate(reference.logits_divergence, *(t.double() for t in logits), **options)
    for i, (ours, low, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert ours.dtype == (dtype if i else reference.compute_dtype(*logits))
        eps = torch.finfo(ours.dtype).eps
        assert (ours - truth).abs().max() <= 2 * ((low - truth).abs().max() + eps * truth.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [2.0, 30.0])
def test_float64(spread, kind):
    """Both sides round: z / T - max - log sum is off by 2 eps of its size D, a term s (log s/t - K) by 4 eps D of D."""
    student, teacher = problem(torch.float64, spread)
    found = evaluate(logits_divergence, student, teacher, divergence=kind, temperature=1.3, jsd_beta=0.3)
    exact = evaluate(reference.logits_divergence, student, teacher, divergence=kind, temperature=1.3, jsd_beta=0.3)
    size = max(1.0, max((t.max() - t.min()).item() for t in (student, teacher)) / 1.3)
    budget = 2 * 4 * torch.finfo(torch.float64).eps * size * max(1.0, exact[0].max().item())
    assert (found[0] - exact[0]).abs().max() <= budget
    assert (found[1] - exact[1]).abs().max() <= budget * 2 / 1.3  # the weights are 2 at most


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    student, teacher = (t[:5, :11] for t in problem(torch.float64))
    mask = torch.arange(5) % 3 != 1

    def run(student):
        return logits_divergence(student, teacher, mask=mask, divergence=kind, temperature=0.8, jsd_beta=0.3)

    torch.autograd.gradcheck(run, student.clone().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_have_no_divergence_and_no_gradient(kind):
    student, _ = problem()
    assert not any(t.any() for t in evaluate(logits_divergence, student, student.clone(), divergence=kind))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_entries_that_one_side_alone_has_do_not_count(padded, backend):
    """They are padding; their logits get no gradient."""
    logits = dict(zip(("student", "teacher"), problem(), strict=True))
    expected = evaluate(logits_divergence, *logits.values(), divergence="jsd", backend=backend)
    logits[padded] = torch.cat([logits[padded], torch.full((N, 5), 9.0)], dim=1)
    values, grad = evaluate(logits_divergence, *logits.values(), divergence="jsd", backend=backend)
    assert torch.equal(values, expected[0]) and torch.equal(grad[:, :V], expected[1])
    assert not grad[:, V:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_and_entries(kind):
    student, teacher = problem()
    mask = torch.arange(N) % 3 != 1
    student[:, 5] = teacher[:, 5] = -math.inf
    exact = evaluate(reference.logits_divergence, student[mask].double(), teacher[mask].double(), divergence=kind)
    student[~mask] = math.nan
    values, grad = evaluate(logits_divergence, student, teacher, mask=mask, divergence=kind)
    assert not values[~mask].any() and not grad[~mask].any()
    assert (values[mask] - exact[0]).abs().max() <= 64 * EPS * exact[0].max()
    assert grad[mask].isfinite().all() and not grad[:, 5].any()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_token_weights_multiply_and_rows_of_weight_0_are_not_looked_at(backend):
    student, teacher = problem()
    weights, mask = torch.linspace(-1, 2, N), torch.arange(N) % 3 != 1
    weights[3] = 0.0
    plain = evaluate(lambda *t: logits_divergence(*t, mask=mask, backend=backend) * weights, student, teacher)
    if backend == "torch":
        student[3] = math.nan
    options = {"mask": mask, "token_weights": weights.double(), "backend": backend}
    assert all(map(torch.equal, evaluate(lambda *t: logits_divergence(*t, **options), student, teacher), plain))


def test_a_kl_is_infinite_where_the_second_distribution_rules_out_what_the_first_allows():
    student, teacher = problem()
    student[:, 5] = -math.inf
    assert (logits_divergence(student, teacher) == math.inf).all()
    assert logits_divergence(student, teacher, divergence="jsd").isfinite().all()


def test_the_gradient_in_place_is_the_same_and_takes_the_logits_storage():
    student, teacher = problem()
    _, expected = evaluate(logits_divergence, student, teacher, divergence="jsd")
    leaf = student.clone().requires_grad_()
    logits = leaf * 1.0
    kept = []
    logits.register_hook(kept.append)
    out = logits_divergence(logits, teacher, divergence="jsd", inplace_backward=True)
    (out * torch.linspace(-1, 2, N)).sum().backward()
    assert torch.equal(leaf.grad, expected) and kept[0].data_ptr() == logits.data_ptr()
    strided = (leaf.t().contiguous() * 1.0).t()
    again = logits_divergence(strided, teacher, divergence="jsd", inplace_backward=True)
    (grad,) = torch.autograd.grad((again * torch.linspace(-1, 2, N)).sum(), leaf)
    assert torch.equal(grad, expected)


def test_who_needs_the_overwritten_logits_is_told():
    student, teacher = problem()
    logits = student.requires_grad_() * 1.0
    squares = logits.square().sum()  # made before, so its backward pass comes after
    loss = logits_divergence(logits, teacher, inplace_backward=True).sum() + squares
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_leading_dimensions_and_no_rows():
    student, teacher = (t[:12].view(3, 4, V) for t in problem())
    assert torch.equal(logits_divergence(student, teacher).view(12), logits_divergence(*(t[:12] for t in problem())))
    assert logits_divergence(student[:0], teacher[:0]).shape == (0, 4)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_in_one_graph(in_place):
    student, teacher = problem()

    def run(student, teacher):
        return logits_divergence(student * 1.0, teacher, divergence="jsd", inplace_backward=in_place)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, evaluate(compiled, student, teacher), evaluate(run, student, teacher)))


def test_opcheck():
    student, teacher = problem()
    options = torch.arange(N) % 3 != 1, "jsd", 0.7, 0.3
    torch.library.opcheck(torch.ops.fastalign.logits_divergence.default, (student, teacher, *options))
    _, stats = torch.ops.fastalign.logits_divergence(student, teacher, *options)
    for backward in (
        torch.ops.fastalign.logits_divergence_backward.default, torch.ops.fastalign.logits_divergence_backward_.default
    ):  # fmt: skip
        torch.library.opcheck(backward, (torch.ones(N), student, teacher, stats, *options))


WRONG = {
    "logits are integer": ((torch.ones(N, V).long(), torch.ones(N, V)), {}, "student_logits is torch.int64"),
    "tokens differ": ((torch.ones(N, V), torch.ones(N + 1, V)), {}, "(37, 53)", "(38, 53)", "the same tokens"),
    "mask is long": ((torch.ones(N, V),) * 2, {"mask": torch.ones(N).long()}, "torch.int64", "bool"),
    "mask is short": ((torch.ones(N, V),) * 2, {"mask": torch.ones(3).bool()}, "(3,)", "(37,)"),
    "weights are integer": (
        (torch.ones(N, V),) * 2,
        {"token_weights": torch.ones(N).long()},
        "torch.int64",
        "floating",
    ),
    "divergence is unknown": ((torch.ones(N, V),) * 2, {"divergence": "tv"}, "'tv'", "forward_kl"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_was_found_and_what_to_do(name):
    logits, options, *words = WRONG[name]
    with pytest.raises(InputError) as error:
        logits_divergence(*logits, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_backend_lists_the_known():
    with pytest.raises(BackendError, match=r"'tpu'.*auto, reference, torch"):
        logits_divergence(*problem(), backend="tpu")
    assert torch.equal(logits_divergence(*problem(), backend="reference"), reference.logits_divergence(*problem()))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [0.3, 1.5])
def test_a_row_without_any_entry_has_no_divergence(kind, side, temperature):
    """All logits -inf is no distribution; logits that are all one very low number are the uniform one."""
    sides = [torch.randn(3, 5), torch.randn(3, 5)]
    sides[side][0], sides[side][1] = -torch.inf, torch.finfo(torch.float32).min / 4  # over 0.3 it is finite still
    leaf = sides[0].requires_grad_()
    values = logits_divergence(leaf, sides[1], divergence=kind, temperature=temperature)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    assert values[0].isnan() and grad[0].isnan().all() and values[1:].isfinite().all() and grad[1:].isfinite().all()
