"""The C++ kernels of sparse_divergence: every instruction set this machine runs, by name, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import reference, sparse_divergence
from fastalign.errors import InputError
from fastalign.ops.backends import cpu

EPS = torch.finfo(torch.float32).eps
ISAS = cpu.describe()["kernels_available"]
KINDS = reference.DIVERGENCES
LEAVES = ("hidden", "weight", "bias")
# More than one tile (256) and chunk (2048) of the vocabulary, a multiple of neither; more than one panel of rows.
N, H, V, K = 61, 37, 2311, 9
OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": -0.6, "temperature": 0.7},
    "capped": {"softcap": 5.0, "logit_scale": 1.3},
    "drop": {"tail": "drop"},
}


def test_the_kernels_are_built():
    """Else every test below would pass by doing nothing."""
    assert "plain" in ISAS and cpu.why_no_kernel("picked") is None


def problem(dtype=torch.float32, *, n=N, width=H, vocab=V, k=K, spread=2.0, seed=0) -> dict[str, torch.Tensor]:
    """Random student, logits of standard deviation `spread`, and the top k of a random teacher, not in order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    top = (normal(n, vocab) * 3).log_softmax(-1).topk(k)
    return {
        "hidden": (normal(n, width) * spread).to(dtype), "weight": (normal(vocab, width) / width**0.5).to(dtype),
        "bias": normal(vocab).to(dtype), "teacher_indices": top.indices, "teacher_logprobs": top.values.float(),
    }  # fmt: skip


def evaluate(function, inputs, leaves=LEAVES, **options):
    """Divergences, and the gradients of a fixed weighted sum of them in the leaves."""
    inputs = {name: t.detach().clone() for name, t in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in leaves]
    out = function(**inputs, **options)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((weights * out).sum(), leaves)]


def native(**arguments):
    return sparse_divergence(**arguments, backend="cpu")


def doubled(inputs):
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def logit_error(inputs) -> float:
    """A bound on the error of a float32 logit, and of its logsumexp: one rounding a product."""
    h, w = inputs["hidden"].double().abs(), inputs["weight"].double().abs()
    return 2 * (h.shape[1] + 8) * EPS * (h @ w.t()).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("leaves", [LEAVES[:1], LEAVES], ids=["frozen", "trainable"])
def test_values_and_gradients_against_float64(isa, leaves, option, kind, dtype):
    """A logit off by e changes a log-probability by 2 e at most; a divergence weighs those by probabilities, in its
    gradient also by a log-ratio, and sums of the gradient over the rows or the vocabulary add their roundings.
    """
    inputs, options = problem(dtype), OPTIONS[option] | {"divergence": kind, "jsd_beta": 0.3}
    mask = torch.arange(N) % 3 != 1
    found = evaluate(native, inputs, leaves, mask=mask, **options)
    exact = evaluate(reference.sparse_divergence, doubled(inputs), leaves, mask=mask, **options)
    finer = torch.finfo(torch.float64).eps / EPS if dtype == torch.float64 else 1.0
    slope = max(1.0, options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
    error = (logit_error(inputs) * slope + V / 256 * EPS) * finer
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    assert found[0].dtype == reference.compute_dtype(inputs["hidden"])
    assert not found[0][~mask].any() and not found[1][~mask].any()
    assert (found[0] - exact[0]).abs().max() <= 4 * error * max(1.0, exact[0].abs().max())
    for name, ours, truth in zip(leaves, found[1:], exact[1:], strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - truth).abs().max() <= (8 * error + rounding) * truth.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_within_1e_5_of_float64_at_a_models_size(isa, kind):
    """Relative to each value, and to the largest entry of each gradient. The teacher differs by 0.8."""
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(24, 576, generator=generator), torch.randn(5000, 576, generator=generator) / 8
    noise = torch.randn(24, 5000, generator=generator)
    top = (h @ w.t() + 0.8 * noise).log_softmax(-1).topk(64)
    inputs = {"hidden": h, "weight": w, "teacher_indices": top.indices, "teacher_logprobs": top.values}
    found = evaluate(native, inputs, LEAVES[:2], divergence=kind)
    exact = evaluate(reference.sparse_divergence, doubled(inputs), LEAVES[:2], divergence=kind)
    assert 0.01 < exact[0].min() < exact[0].max() < 1
    assert ((found[0] - exact[0]) / exact[0]).abs().max() < 1e-5
    for ours, truth in zip(found[1:], exact[1:], strict=True):
        assert (ours - truth).abs().max() < 1e-5 * truth.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("confident_in", ["top", "tail"])
def test_nearly_all_mass_on_either_side(isa, confident_in, kind):
    """A tail of e^-100, or top entries of e^-100 each: neither may come from 1 minus the other, or be scaled by it."""
    inputs = problem(spread=0.1)
    inputs["teacher_indices"] = torch.arange(K).repeat(N, 1) * (V // K)
    inputs["bias"] = torch.zeros(V)
    inputs["bias"][inputs["teacher_indices"][0]] = 100.0 if confident_in == "top" else -100.0
    found = evaluate(native, inputs, divergence=kind)
    exact = evaluate(reference.sparse_divergence, doubled(inputs), divergence=kind)
    for ours, truth in zip(found, exact, strict=True):
        assert (ours - truth).abs().max() <= 4 * 100 * EPS * max(1.0, truth.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_entries_that_are_ruled_out(isa, kind):
    inputs = problem()
    ruled_out = torch.zeros(V, dtype=torch.bool)
    ruled_out[:300] = ruled_out[-100:] = True  # a whole tile, and more
    ruled_out[inputs["teacher_indices"]] = False
    inputs["bias"][ruled_out] = -math.inf
    found = evaluate(native, inputs, divergence=kind)
    exact = evaluate(reference.sparse_divergence, doubled(inputs), divergence=kind)
    for ours, truth in zip(found, exact, strict=True):
        assert (ours - truth).abs().max() <= 8 * logit_error(inputs) * truth.abs().max()
    inputs["bias"][inputs["teacher_indices"][5, 2]] = -math.inf
    values = native(**inputs, divergence="forward_kl")
    assert values[5] == math.inf and not values.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["lump", "drop"])
def test_gradcheck(isa, tail, kind):
    inputs = problem(torch.float64, n=7, vocab=11, k=3)
    mask = torch.arange(7) != 2

    def run(hidden, weight, bias):
        teacher = (inputs["teacher_indices"], inputs["teacher_logprobs"])
        return sparse_divergence(
            hidden, weight, *teacher, bias=bias, mask=mask, divergence=kind, tail=tail, softcap=3.0, temperature=0.8,
            backend="cpu",
        )  # fmt: skip

    leaves = [inputs["hidden"][:, :4], inputs["weight"][:, :4], inputs["bias"]]
    torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in leaves])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(isa, threads, dtype):
    inputs, results = problem(dtype, n=230, vocab=5000), []
    for count in (1, 2, 8):
        threads(count)
        results.append(evaluate(native, inputs))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_threads_do_not_change_a_bit_of_a_wide_heads_gradient(isa, threads):
    """Where rows of all workers would be too much for a budget of scratch memory; as in test_cpu_head.py."""
    inputs, results = problem(n=130, width=8192, vocab=3 * 256 + 1), []
    for count in (1, 2, 8, 16):
        threads(count)
        results.append(evaluate(native, inputs, LEAVES[1:]))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_batch_does_not_change_a_row_by_a_bit(isa):
    inputs = problem(n=230)
    shared = {name: inputs[name] for name in ("weight", "bias")}

    def run(rows):
        own = {name: t[rows] for name, t in inputs.items() if name not in shared}
        hidden = own["hidden"].requires_grad_()
        out = native(**own, **shared)
        return out.detach(), *torch.autograd.grad(out.sum(), hidden)

    whole = run(list(range(230)))
    for rows in ([0], [229], list(range(200, 90, -7))):
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, run(rows), strict=True))


@pytest.mark.parametrize(
    ("n", "vocab", "k"), [(1, 1, 1), (1, 3, 2), (25, 257, 256), (2, 255, 255), (24, 2048, 1), (30, 300, 300)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_around_the_tiles(isa, kind, n, vocab, k):
    """Up to all entries, where there is no tail."""
    inputs = problem(n=n, vocab=vocab, k=k)
    found = evaluate(native, inputs, divergence=kind)
    exact = evaluate(reference.sparse_divergence, doubled(inputs), divergence=kind)
    error = logit_error(inputs) + vocab / 256 * EPS
    assert (found[0] - exact[0]).abs().max() <= 4 * error * max(1.0, exact[0].abs().max())
    for ours, truth in zip(found[1:], exact[1:], strict=True):
        assert (ours - truth).abs().max() <= 8 * error * max(inputs["weight"].abs().max(), truth.abs().max())


def test_every_layout_gives_the_same_bits(isa):
    inputs = problem()
    expected = native(**inputs)
    wide = torch.full((N, H + 5), 9.0)
    wide[:, 2 : H + 2] = inputs["hidden"]
    strided = inputs | {
        "weight": inputs["weight"].repeat_interleave(2, 1)[:, ::2],
        "bias": inputs["bias"].repeat_interleave(2)[::2],
        "teacher_indices": inputs["teacher_indices"].t().contiguous().t(),
    }
    assert torch.equal(native(**strided | {"hidden": wide[:, 2 : H + 2]}), expected)
    shuffled = torch.randperm(K)
    again = native(**inputs | {name: inputs[name][:, shuffled] for name in ("teacher_indices", "teacher_logprobs")})
    torch.testing.assert_close(again, expected, rtol=4 * EPS, atol=0)


def test_masked_rows_are_zero_and_touch_nothing(isa):
    inputs, mask = problem(), torch.arange(N) % 3 != 1
    expected = evaluate(native, inputs, mask=mask)
    inputs["hidden"][~mask] = math.nan
    inputs["teacher_indices"][~mask] = -1
    assert all(map(torch.equal, evaluate(native, inputs, mask=mask), expected))
    assert torch.equal(native(**inputs, token_weights=2.0 * mask), 2 * expected[0])
    for t in evaluate(native, inputs, mask=torch.zeros(N, dtype=torch.bool)):
        assert not t.any()
    values = native(**problem() | {"hidden": inputs["hidden"]})
    assert values[~mask].isnan().all() and values[mask].isfinite().all()


@pytest.mark.parametrize("leaves", [LEAVES[:1], LEAVES], ids=["frozen", "trainable"])
def test_compiles_in_one_graph_to_the_same_bits(leaves):
    inputs, mask = problem(), torch.arange(N) % 3 != 1

    def run(hidden, weight, bias, teacher_indices, teacher_logprobs):
        return native(
            hidden=hidden, weight=weight, teacher_indices=teacher_indices, teacher_logprobs=teacher_logprobs,
            bias=bias, mask=mask,
        )  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, evaluate(compiled, inputs, leaves), evaluate(run, inputs, leaves)))


def test_opcheck(isa):
    x, mask, on_cpu = problem(), torch.arange(N) % 3 != 1, {"backend": "cpu"}
    args = (x["hidden"], x["weight"], x["bias"], x["teacher_indices"], mask, (1.3, 5.0, 0.7))
    torch.library.opcheck(torch.ops.fastalign.linear_topk_logprobs.default, (*args, True), on_cpu)
    logprobs, *rest = torch.ops.fastalign.linear_topk_logprobs(*args, True, **on_cpu)
    args = (torch.ones_like(logprobs), *args[:5], logprobs, *rest, args[5], [True, True, True])
    torch.library.opcheck(torch.ops.fastalign.linear_topk_logprobs_backward.default, args, on_cpu)


def test_auto_takes_the_kernels_where_they_are_fast():
    inputs = problem()
    for isa in ISAS:
        cpu.select(isa)
        expected = sparse_divergence(**inputs, backend="torch" if isa == "plain" else "cpu")
        assert torch.equal(sparse_divergence(**inputs), expected)
    cpu.select(None)
    assert torch.equal(sparse_divergence(**doubled(inputs)), sparse_divergence(**doubled(inputs), backend="torch"))


def test_a_dtype_it_does_not_take_is_named():
    inputs = problem()
    inputs |= {name: inputs[name].to(torch.float8_e4m3fn) for name in ("hidden", "weight")}
    with pytest.raises(InputError, match=r"hidden is torch.float8_e4m3fn"):
        native(**inputs)
