"""The anchored driver and its kernels against float64, and which bits must not depend on what."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalign import linear_logprobs, reference
from fastalign.errors import BackendError
from fastalign.kernels import anchored_logprobs as kernels
from fastalign.ops.backends import anchored as launches
from fastalign.ops.head import anchored


def shared_tests():
    """The tests of backend "torch", on backend "anchored"."""
    path = Path(__file__).parents[2] / "ops" / "test_linear_logprobs.py"
    spec = importlib.util.spec_from_file_location("anchored_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.fast = lambda *args, **options: linear_logprobs(*args, backend="anchored", **options)
    return module


shared = shared_tests()
# bfloat16 exponentials: a budget of one row's bytes is half of what the shared tests have for float32.
BUDGETS = {"frozen": None, "cached": 1 << 20, "partly cached": 16 * shared.V * 2, "recomputed": 0}


@pytest.fixture(autouse=True)
def sums_one_by_one(monkeypatch):
    """Numpy's BLAS gives a row other bits by where it lies in the matrix, which no tensor core does."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype=None: np.einsum("mk,kn->mn", a, b, optimize=False))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16 rows of exponentials in the forward pass, and parts of 24 entries in the backward pass."""
    monkeypatch.setattr(anchored, "block_rows", lambda vocab: 16)
    monkeypatch.setattr(anchored, "part_columns", lambda *args: 24)


@pytest.fixture(autouse=True)
def entropies_of_confident_rows(monkeypatch):
    """The entropy's logarithms are relative to the target's logit, so its rounding grows with the log-probability."""
    strict = shared.assert_within_budget

    def check(actual, plain, exact, eps):
        if len(exact) == 2 and exact[0].dim() == 1 and eps == shared.EPS:
            strict(actual[:1], plain[:1], exact[:1], eps)
            extra = 4 * shared.EPS * exact[0].abs().max()
            budget = 2 * ((plain[1] - exact[1]).abs().max() + eps * exact[1].abs().max()) + extra
            assert (actual[1] - exact[1]).abs().max() <= budget
        else:
            strict(actual, plain, exact, eps)

    monkeypatch.setattr(shared, "assert_within_budget", check)


CASES = [(option, torch.bfloat16, entropy, budget) for option, entropy in (("plain", False), ("all", True))
         for budget in BUDGETS]  # fmt: skip
CASES += [("all", torch.bfloat16, False, budget) for budget in ("frozen", "cached")]
CASES += [("softcap", torch.bfloat16, False, "cached"), ("all", torch.float16, False, "cached")]
CASES += [("all", torch.float16, True, "frozen")]


@pytest.mark.parametrize(("option", "dtype", "entropy", "budget"), CASES, ids=str)
def test_within_the_error_budget(option, dtype, entropy, budget):
    options = dict(shared.OPTIONS[option])
    inputs = shared.problem(dtype, n=19, ignored=0.1, bias=options.pop("bias", False))
    options |= {"frozen": budget == "frozen", "memory_budget": BUDGETS[budget], "entropy": entropy}
    shared.check_against_float64(inputs, **options)


def spread_problem(gap: float, *, n=16, width=40, vocab=75, seed=3):
    """Inputs whose target lies `gap` nats below the largest logit, with logits of the same size all around."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator).bfloat16()
    weight = torch.randn(vocab, width, generator=generator).bfloat16()
    logits = hidden.double() @ weight.double().T
    targets = torch.randint(vocab, (n,), generator=generator)
    targets[0] = vocab - 1
    scale = gap / (logits.amax(1) - logits.gather(1, targets[:, None])[:, 0]).clamp(min=0.1).median()
    return hidden, weight, targets, float(scale)


@pytest.mark.parametrize("gap", [1.0, 80.0, 300.0])
@pytest.mark.parametrize("budget", ["frozen", "cached"])
def test_targets_far_below_the_maximum(gap, budget):
    hidden, weight, targets, scale = spread_problem(gap)
    options = {"frozen": budget == "frozen", "memory_budget": BUDGETS[budget], "logit_scale": scale}
    outputs, grads = shared.evaluate(shared.fast, hidden, weight, targets, **options)
    del options["memory_budget"]
    exact, exact_grads = shared.evaluate(
        reference.linear_logprobs, hidden.double(), weight.double(), targets, **options
    )
    # A float32 logit of some hundred nats is off by some hundred eps.
    assert (outputs[0] - exact[0]).abs().max() <= 16 * shared.EPS * max(gap, 10.0)
    for got, want in zip(grads, exact_grads, strict=True):
        assert (got - want).norm() <= 0.012 * want.norm()


def test_rows_are_rescued_by_the_device(monkeypatch):
    """Of rows with a gap of some 100 nats, those over 83 overflow; without the rescue their results would be wrong."""
    hidden, weight, targets, scale = spread_problem(100.0)
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets, logit_scale=scale)
    logits = hidden.double() @ weight.double().T * scale
    far = logits.amax(1) - logits.gather(1, targets[:, None])[:, 0] > 90
    assert 3 < far.sum() < 13
    good = linear_logprobs(hidden, weight, targets, logit_scale=scale, backend="anchored")
    assert (good - exact).abs().max() < 1e-3
    monkeypatch.setattr(kernels, "rescue", {(len(hidden),): lambda *args, **options: None})
    bad = linear_logprobs(hidden, weight, targets, logit_scale=scale, backend="anchored")
    assert torch.equal(bad[~far & (exact > -80)], good[~far & (exact > -80)])
    assert not (bad[far] - exact[far]).abs().max() < 1e-3


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_logits_that_are_all_far_from_0(shift):
    """The anchor follows the target's logit: exponentials relative to a fixed one would all vanish, or overflow."""
    hidden, weight, targets, _ = shared.problem(torch.bfloat16, n=5)
    bias = torch.full((len(weight),), shift)
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets)
    assert (shared.fast(hidden, weight, targets, bias=bias) - exact).abs().max() < 4 * shared.EPS * abs(shift)


def test_the_same_bits_with_and_without_gradients_and_in_any_batch():
    """Or the margins of preference training would not begin at exactly 0."""
    hidden, weight, targets, bias = shared.problem(torch.bfloat16, n=18, bias=True)
    hidden[7] *= 40  # a row that is rescued
    targets[7] = (hidden[7].float() @ weight.float().T).argmin()
    options = {"bias": bias}
    plain = shared.fast(hidden, weight, targets, **options)
    for budget, memory_budget in BUDGETS.items():
        frozen = budget == "frozen"
        (logprobs,), _ = shared.evaluate(
            shared.fast, hidden, weight, targets, bias, frozen=frozen, memory_budget=memory_budget
        )
        assert torch.equal(plain, logprobs), budget
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
    for rows in (order, order[:9], order[:1], torch.tensor([7])):
        assert torch.equal(shared.fast(hidden[rows], weight, targets[rows], **options), plain[rows])


@pytest.mark.parametrize("budget", ["frozen", "partly cached"])
def test_edges(budget, monkeypatch):
    problem = shared.problem
    monkeypatch.setattr(shared, "BUDGETS", BUDGETS)
    monkeypatch.setattr(shared, "problem", lambda dtype=None, **options: problem(torch.bfloat16, **{"n": 17} | options))
    shared.test_logits_up_to_60(budget == "frozen", torch.bfloat16, budget)
    shared.test_masked_vocabulary_entries(None, False, budget)
    shared.test_masked_vocabulary_entries(4.0, True, budget)
    shared.test_masked_target(budget)


@pytest.mark.parametrize("budget", ["frozen", "partly cached"])
def test_confident_rows_keep_their_relative_accuracy(budget, monkeypatch):
    """Log-probs down to -1e-25, which are 60 nats of distance to all other entries."""
    monkeypatch.setattr(shared, "BUDGETS", BUDGETS)
    shared.test_confident_rows_keep_their_relative_accuracy(torch.bfloat16, budget)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_any_number_of_rows(n, trainable):
    hidden, weight, targets, bias = shared.problem(torch.bfloat16, n=n, bias=True)
    options = {"frozen": not trainable, "entropy": False}
    outputs, grads = shared.evaluate(shared.fast, hidden, weight, targets, bias, **options)
    expected = shared.evaluate(reference.linear_logprobs, hidden, weight, targets, bias, **options)
    assert [t.shape for t in outputs + grads] == [t.shape for t in expected[0] + expected[1]]
    if n:
        shared.check_against_float64((hidden, weight, targets, bias), memory_budget=None, **options)
    else:
        assert not any(g.any() for g in grads)


def test_nan_and_inf_only_where_the_reference_has_them():
    hidden, weight, targets, bias = shared.problem(torch.bfloat16, n=21, bias=True)
    hidden[3, 2], hidden[5] = math.nan, math.inf
    bias[targets[11]] = -math.inf
    bad = ~reference.linear_logprobs(hidden, weight, targets, bias=bias).isfinite()
    assert bad[[3, 5, 11]].all()
    leaf = hidden.clone().requires_grad_()
    logprobs = shared.fast(leaf, weight, targets, bias=bias)
    assert torch.equal(~logprobs.isfinite(), bad) and logprobs[11] == -math.inf
    logprobs[~bad].sum().backward()
    assert leaf.grad[~bad].isfinite().all()


def test_ignored_rows_hold_anything_and_change_nothing():
    hidden, weight, targets, bias = shared.problem(torch.bfloat16, n=21, ignored=0.4, bias=True)
    expected = shared.evaluate(shared.fast, hidden, weight, targets, bias)
    hidden[targets == -100] = math.nan
    got = shared.evaluate(shared.fast, hidden, weight, targets, bias)
    assert all(map(torch.equal, got[0] + got[1], expected[0] + expected[1]))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_while_a_graph_is_captured_nothing_is_read_on_the_host(trainable, monkeypatch):
    hidden, weight, targets, _ = shared.problem(torch.bfloat16, n=21, ignored=0.3)
    expected = shared.evaluate(shared.fast, hidden, weight, targets, frozen=not trainable)
    monkeypatch.setattr("fastalign.ops.head.rows.is_capturing", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # what would wait for the GPU
    got = shared.evaluate(shared.fast, hidden, weight, targets, frozen=not trainable)
    assert not got[0][0][targets == -100].any() and not got[1][0][targets == -100].any()
    for found, wanted in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-3)


def test_opcheck():
    hidden, weight, targets, bias = shared.problem(torch.bfloat16, n=3, bias=True)
    args = (hidden, weight, targets, bias, 1.3, None, 0.7, -100, False, False, 16)
    torch.library.opcheck(torch.ops.fastalign.linear_logprobs.default, args, {"backend": "anchored"})


def test_what_it_cannot_take_is_said():
    hidden, weight, targets, _ = shared.problem(torch.bfloat16, n=4)
    assert launches.why_not(hidden, weight) is None
    for tensors, why in (
        ((hidden.float(), weight.float()), r"hidden is torch.float32.*takes both bfloat16"),
        ((hidden, weight.half()), r"weight torch.float16"),
        ((hidden[:, :20], weight[:, :20].contiguous()), r"strides \(20, 1\).*multiple of 8"),
        ((hidden, weight.t().contiguous().t()), r"strides \(1, 53\)"),
    ):
        assert launches.why_not(*tensors) is not None
        with pytest.raises(BackendError, match=why):
            linear_logprobs(*tensors, targets, backend="anchored")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (None, None),
        (lambda result: (result[0] + 0.01, *result[1:]), "log-probs are off by 0.01"),
        (lambda result: (_ for _ in ()).throw(RuntimeError("no")), "they fail (RuntimeError: no)"),
    ],
)
def test_the_kernels_are_tried_before_a_gpu_uses_them(monkeypatch, broken, said):
    finish = launches.finish
    if broken:
        monkeypatch.setattr(launches, "finish", lambda *args, **options: broken(finish(*args, **options)))
    found = launches.try_out(torch.device("cpu"))
    assert found == said if said is None else said in found
