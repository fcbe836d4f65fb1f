"""preference_loss: every loss and backend against `fastalign.losses` under autograd in float64, at any margin."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import BackendError, InputError
from fastalign.losses import LENGTH_NORMALISED
from fastalign.ops.backends import cpu
from fastalign.ops.preference_loss import FORMULAS, preference_loss

FUSED = ["cpu", "torch"]
PAIRS = [name for name in FORMULAS if name != "kto"]
FREE = {"simpo", "cpo", "orpo"}
OPTIONS = {
    "dpo": [{}, {"beta": 0.7, "label_smoothing": 0.2}],
    "dpo_norm": [{"beta": 3.0}],
    "cpo": [{"label_smoothing": 0.1}],
    "simpo": [{}, {"beta": 2.5, "gamma_beta_ratio": 0.3, "label_smoothing": 0.1}],
    "robust": [{"beta": 0.5, "label_smoothing": 0.3}],
    "ipo": [{"beta": 0.2}],
    "ipo_tau": [{"beta": 0.3, "tau": 0.8}],
    "hinge": [{"beta": 0.5}],
    "orpo": [{"beta": 0.4}],
    "kto": [{}, {"beta": 0.5, "weights": (1.0, 0.4)}],
}
CASES = [(name, options) for name, every in OPTIONS.items() for options in every]
# Empty sequences first, in the middle and last; a pair of two empty ones.
CU_SEQLENS = torch.tensor([0, 0, 4, 9, 10, 17, 17, 17, 17, 20, 33, 41, 41])
S, SEQUENCES = 41, 12


def test_every_formula_is_tested():
    assert OPTIONS.keys() == FORMULAS.keys()


def problem(name, dtype=torch.float64, size=1.0, seed=0):
    """(logprobs, ref_sums, keywords); sums of about -`size` a token."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -size * torch.rand(S, generator=generator, dtype=torch.float64) - 1e-3 * size
    ref_sums = -3.5 * size * torch.rand(SEQUENCES, generator=generator, dtype=torch.float64)
    extra = {}
    if name == "kto":
        labels = torch.rand(SEQUENCES, generator=generator) < 0.5
        extra = {"labels": labels, "kl": torch.tensor(0.3 * size)}
    return logprobs.to(dtype), None if name in FREE else ref_sums.to(dtype), extra


def evaluate(logprobs, ref_sums, name, **options):
    """[losses, rewards, sums, coefficients, gradient of a fixed weighted sum of losses and sums]."""
    logprobs = logprobs.detach().clone().requires_grad_()
    out = preference_loss(logprobs, options.pop("cu_seqlens", CU_SEQLENS), ref_sums, loss_type=name, **options)
    weights = torch.linspace(-1, 2, out.losses.numel(), dtype=logprobs.dtype)
    total = (weights * out.losses).sum() + (out.sums * torch.linspace(1, 3, len(out.sums), dtype=logprobs.dtype)).sum()
    return [t.detach() for t in out] + list(torch.autograd.grad(total, logprobs))


@pytest.mark.parametrize("averaged", [None, False, True])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_float64_equals_the_losses_under_autograd(backend, name, options, averaged):
    logprobs, ref_sums, extra = problem(name)
    extra |= {"averaged": averaged, **options}
    found = evaluate(logprobs, ref_sums, name, backend=backend, **extra)
    exact = evaluate(logprobs, ref_sums, name, backend="reference", **extra)
    for got, want in zip(found, exact, strict=True):
        # S additions of numbers of size 1, then some twenty operations, each within eps of the largest in sight.
        torch.testing.assert_close(got, want, rtol=64 * 2.3e-16, atol=64 * 2.3e-16 * max(1.0, want.abs().max()))


@pytest.mark.parametrize("size", [1.0, 30.0, 3e3])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_float32_error_budget(backend, name, options, size):
    """What rounding the inputs to float32 and summing S of them in float32 may do: margins off by `error`."""
    logprobs, ref_sums, extra = problem(name, torch.float32, size)
    extra |= options
    if name == "orpo":  # an empty completion counts as -tiny, another number in float64
        extra["cu_seqlens"] = torch.tensor([0, 3, 4, 9, 10, 17, 18, 20, 21, 22, 33, 40, 41])
    found = evaluate(logprobs, ref_sums, name, backend=backend, **extra)
    wide = logprobs.double(), None if ref_sums is None else ref_sums.double()
    exact = evaluate(*wide, name, backend="reference", **extra)
    eps = torch.finfo(torch.float32).eps
    error = 16 * eps * exact[2].abs().max()
    slope = exact[3].abs().max() * S
    curvature = 2.0 if name.startswith("ipo") else max(1.0, options.get("beta", 2.0)) ** 2
    assert (found[2] - exact[2]).abs().max() <= error
    assert (found[1] - exact[1]).abs().max() <= 2 * error * options.get("beta", 2.0)
    assert (found[0] - exact[0]).abs().max() <= 4 * error * max(1.0, slope) + 4 * eps * exact[0].abs().max()
    assert (found[3] - exact[3]).abs().max() <= 4 * error * curvature + 16 * eps * exact[3].abs().max()
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_margins_of_ten_thousand(backend, name, options, dtype):
    """Sequences of one token: margins of +-1e4 and of 0, averages of -tiny and of 0."""
    tiny = torch.finfo(dtype).tiny
    logprobs = torch.tensor([-1e4, -tiny, -tiny, -1e4, -1e4, -1e4, 0.0, -1.0, -1.0, 0.0, 0.0, 0.0], dtype=dtype)
    bounds = torch.arange(13)
    ref_sums = None if name in FREE else torch.zeros(12, dtype=dtype)
    extra = {"labels": torch.arange(12) % 2 == 0} if name == "kto" else {}
    found = evaluate(logprobs, ref_sums, name, cu_seqlens=bounds, backend=backend, **extra, **options)
    exact = evaluate(logprobs, ref_sums, name, cu_seqlens=bounds, backend="reference", **extra, **options)
    eps = torch.finfo(dtype).eps
    for got, want in zip(found, exact, strict=True):
        assert got.isfinite().all()
        # Arguments of 1e4 carry rounding of 1e4 eps, also in an exponent of exp; sums to the smallest normal number.
        budget = 32 * eps * (1e4 * want.abs() + want.abs().clamp(max=1.0) + 1) + tiny
        assert ((got - want).abs() <= budget).all(), (got, want)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_gradcheck(backend, name):
    logprobs, ref_sums, extra = problem(name)

    def run(values):
        out = preference_loss(values, CU_SEQLENS, ref_sums, loss_type=name, backend=backend, **extra)
        return out.losses, out.sums

    assert torch.autograd.gradcheck(run, logprobs.requires_grad_())


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_by_hand(backend):
    """Two pairs at a margin of 0 and of log 3 / beta: dpo is log 2 and log(4/3), slopes -beta/2 and -beta/4."""
    beta, third = 0.5, 2 * 1.0986122886681098
    logprobs = torch.tensor([-1.0, -1.0, -2.0, third - 3, -3.0], dtype=torch.float64)
    bounds, ref_sums = torch.tensor([0, 2, 3, 4, 5]), torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    out = preference_loss(logprobs, bounds, ref_sums, beta=beta, backend=backend)
    close = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(out.losses, torch.tensor([2.0, 4 / 3], dtype=torch.float64).log(), **close)
    torch.testing.assert_close(out.sums, torch.tensor([-2, -2, third - 3, -3], dtype=torch.float64), **close)
    torch.testing.assert_close(
        out.rewards, torch.tensor([-0.5, -0.5, 0.5 * third - 1, -1.0]).double(), rtol=0, atol=1e-7
    )
    slopes = torch.tensor([-0.25, -0.25, 0.25, -0.125, 0.125], dtype=torch.float64)
    torch.testing.assert_close(out.coefficients, slopes, **close)
    assert not out.rewards.requires_grad and not out.coefficients.requires_grad


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo"])
@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_chosen_first_then_rejected(backend, name):
    logprobs, ref_sums, _ = problem(name)
    order = torch.cat([torch.arange(0, SEQUENCES, 2), torch.arange(1, SEQUENCES, 2)])
    tokens = torch.cat([torch.arange(int(CU_SEQLENS[i]), int(CU_SEQLENS[i + 1])) for i in order])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), CU_SEQLENS.diff()[order].cumsum(0)])
    there = preference_loss(logprobs, CU_SEQLENS, ref_sums, loss_type=name, backend=backend)
    leaf = logprobs[tokens].requires_grad_()
    here = preference_loss(
        leaf, bounds, None if ref_sums is None else ref_sums[order], loss_type=name, alternating=False, backend=backend
    )
    assert torch.equal(here.losses, there.losses) and torch.equal(here.coefficients, there.coefficients[tokens])
    assert torch.equal(here.sums, there.sums[order]) and torch.equal(here.rewards, there.rewards[order])
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    (grad,) = torch.autograd.grad((here.losses * weights).sum(), leaf)
    of_token = weights.repeat(2).repeat_interleave(bounds.diff())
    torch.testing.assert_close(grad, here.coefficients * of_token, rtol=1e-15, atol=0)


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_lengths_that_count_fewer_tokens(backend):
    logprobs, ref_sums, _ = problem("ipo")
    masked = logprobs.clone()
    masked[CU_SEQLENS[:-1][CU_SEQLENS.diff() > 0]] = 0.0  # the first token of each sequence is not scored
    lengths = (CU_SEQLENS.diff() - 1).clamp(min=0).double()
    kept = torch.ones(S, dtype=torch.bool)
    kept[CU_SEQLENS[:-1][CU_SEQLENS.diff() > 0]] = False
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.long().cumsum(0)])
    here = preference_loss(masked, CU_SEQLENS, ref_sums, loss_type="ipo", lengths=lengths, backend=backend)
    there = preference_loss(logprobs[kept], bounds, ref_sums, loss_type="ipo", backend=backend)
    torch.testing.assert_close(here.losses, there.losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(here.coefficients[kept], there.coefficients, rtol=1e-13, atol=0)


def test_the_native_sums_are_in_float64_and_do_not_depend_on_the_batch():
    logprobs = torch.tensor([-1e8] + [-1.0] * 100 + [-1e8])
    bounds, ref_sums = torch.tensor([0, 101, 102]), torch.zeros(2)
    found = preference_loss(logprobs, bounds, ref_sums, beta=1.0)  # and "auto" is the native one here
    assert found.losses.item() == pytest.approx(100.0, rel=1e-6)
    logprobs, ref_sums, _ = problem("dpo", torch.float32)
    whole = preference_loss(logprobs, CU_SEQLENS, ref_sums, backend="cpu")
    part = preference_loss(logprobs[17:], CU_SEQLENS[8:] - 17, ref_sums[8:], backend="cpu")
    assert torch.equal(whole.losses[4:], part.losses) and torch.equal(whole.coefficients[17:], part.coefficients)


@pytest.mark.parametrize("backend", FUSED)
def test_only_what_is_asked_for_is_differentiated(backend):
    logprobs, ref_sums, _ = problem("dpo")
    logprobs.requires_grad_()
    out = preference_loss(logprobs, CU_SEQLENS, ref_sums, backend=backend)
    (grad,) = torch.autograd.grad(out.sums.sum(), logprobs, retain_graph=True)
    assert grad.eq(1).all()
    assert torch.equal(torch.autograd.grad(out.losses.sum(), logprobs)[0], out.coefficients)
    with torch.no_grad():
        assert not preference_loss(logprobs, CU_SEQLENS, ref_sums, backend=backend).losses.requires_grad


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_no_sequences(backend):
    empty = torch.zeros(0)
    if backend != "reference":
        out = preference_loss(empty, torch.tensor([0]), empty, backend=backend)
        assert [t.shape for t in out] == [(0,)] * 4
    out = preference_loss(empty, torch.tensor([0, 0, 0]), torch.zeros(2), backend=backend)
    assert out.losses.tolist() == pytest.approx([0.6931472]) and out.sums.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", FUSED)
def test_strides(backend):
    logprobs, ref_sums, _ = problem("dpo")

    def strided(t):
        return t.repeat_interleave(2)[::2]

    found = evaluate(strided(logprobs), strided(ref_sums), "dpo", cu_seqlens=strided(CU_SEQLENS), backend=backend)
    assert all(map(torch.equal, found, evaluate(logprobs, ref_sums, "dpo", backend=backend)))


@pytest.mark.parametrize("name", ["dpo", "kto"])
@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_offsets_in_int32(backend, name):
    logprobs, ref_sums, extra = problem(name)
    found = evaluate(logprobs, ref_sums, name, cu_seqlens=CU_SEQLENS.int(), backend=backend, **extra)
    assert all(map(torch.equal, found, evaluate(logprobs, ref_sums, name, backend=backend, **extra)))


def op_arguments(name, backend):
    logprobs, ref_sums, extra = problem(name, torch.float32)
    defaults = {"dpo": (0.1, 0.0), "orpo": (0.1,), "kto": (0.1, (1.0, 1.0))}[name]
    formula = FORMULAS[name](*defaults)
    kl = extra["kl"].reshape(1) if extra else None
    averaged = name in LENGTH_NORMALISED
    return (
        logprobs, CU_SEQLENS, ref_sums, None, extra.get("labels"), kl, int(formula.form), averaged, True, 0.1,
        *formula[1:], backend,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend, name):
    arguments = op_arguments(name, backend)
    torch.library.opcheck(torch.ops.fastalign.preference_loss.default, arguments)
    losses, _, sums, coefficients = torch.ops.fastalign.preference_loss(*arguments)
    for grads in ((losses, None), (None, sums), (losses, sums)):
        arguments = (*grads, coefficients, CU_SEQLENS, losses.shape[0], True, backend)
        torch.library.opcheck(torch.ops.fastalign.preference_loss_backward.default, arguments)


@pytest.mark.parametrize("name", ["dpo", "simpo", "kto"])
@pytest.mark.parametrize("backend", FUSED)
def test_compiles_in_one_graph(backend, name):
    logprobs, ref_sums, extra = problem(name, torch.float32)

    def run(values, bounds, sums):
        return preference_loss(values, bounds, sums, loss_type=name, backend=backend, **extra)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = [], []
    for function, into in ((run, want), (compiled, got)):
        leaf = logprobs.detach().clone().requires_grad_()
        out = function(leaf, CU_SEQLENS, ref_sums)
        into.extend([*out, *torch.autograd.grad(out.losses.mean(), leaf)])
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("cu_seqlens", [[1, 3, 4], [0, 3, 3], [0, 3, 5], [0, 5, 4]], ids=str)
def test_wrong_offsets(cu_seqlens, backend):
    with pytest.raises(InputError, match=r"must rise from 0"):
        preference_loss(torch.zeros(4), torch.tensor(cu_seqlens), torch.zeros(2), backend=backend)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logprobs": torch.zeros(41, dtype=torch.bfloat16)}, ("torch.bfloat16", "float32 or float64")),
        ({"cu_seqlens": torch.tensor([0, 41])}, ("(2,)", "(2B + 1,)", "S=41")),
        ({"ref_sums": None}, ("None", "'dpo' needs one")),
        ({"ref_sums": torch.zeros(3)}, ("(3,)", "(12,)")),
        ({"loss_type": "simpo"}, ("given", "'simpo' takes none")),
        ({"loss_type": "aot"}, ("'aot'", "pairwise_loss")),
        ({"loss_type": "kto"}, ("labels is None", "'kto'")),
        ({"labels": torch.zeros(12, dtype=torch.bool)}, ("labels is given", "'dpo'")),
        ({"loss_type": "kto", "labels": torch.zeros(12)}, ("torch.float32", "bool")),
        ({"lengths": torch.zeros(12, dtype=torch.int64)}, ("lengths", "torch.int64", "torch.float32")),
        ({"cu_seqlens": CU_SEQLENS.to("meta")}, ("cpu", "meta", "one device")),
        ({"tau": 1.0}, ("'tau'", "beta, label_smoothing")),
        ({"beta": 0.0}, ("beta is 0.0", "above 0")),
        ({"label_smoothing": 0.5}, ("label_smoothing is 0.5", "[0, 0.5)")),
        ({"loss_type": "ipo_tau", "tau": float("nan")}, ("tau is nan", "finite")),
    ],
    ids=str,
)  # fmt: skip
def test_errors_say_what_was_found_and_what_to_do(change, words):
    logprobs, ref_sums, _ = problem("dpo", torch.float32)
    given = {"logprobs": logprobs, "cu_seqlens": CU_SEQLENS, "ref_sums": ref_sums} | change
    with pytest.raises(InputError) as error:
        preference_loss(**given)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_backends_that_cannot_run(monkeypatch):
    logprobs, ref_sums, _ = problem("dpo")
    with pytest.raises(BackendError, match=r"'tpu'.*auto, reference, torch, cpu"):
        preference_loss(logprobs, CU_SEQLENS, ref_sums, backend="tpu")
    with pytest.raises(BackendError, match=r"backend='cpu'.*meta"):
        preference_loss(*(t.to("meta") for t in (logprobs, CU_SEQLENS, ref_sums)), backend="cpu")
    monkeypatch.setattr(cpu.in_use, "unavailable", "the native module is not built, run `make build`")
    with pytest.raises(BackendError, match="make build"):
        preference_loss(logprobs, CU_SEQLENS, ref_sums, backend="cpu")
