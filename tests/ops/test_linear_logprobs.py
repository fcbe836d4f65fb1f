"""linear_logprobs against the float64 reference: values, gradients, edges, and what must not depend on what."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import linear_logprobs, reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.head import tiling

EPS = torch.finfo(torch.float32).eps
N, H, V = 37, 24, 53
ROW_BYTES = V * 4  # of one float32 row of probabilities
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "logit_scale": {"logit_scale": 0.6},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 1.7},
    "all": {"bias": True, "logit_scale": -0.6, "softcap": 3.0, "temperature": 0.7},
}
# A frozen head, and a trainable one with all tiles kept, some, and none.
BUDGETS = {"frozen": None, "cached": 1 << 20, "partly cached": 16 * ROW_BYTES, "recomputed": 0}


# Every option in float64, where an error shows most; every dtype with none and with all of them.
OPTIONS_AND_DTYPES = [(option, torch.float64) for option in OPTIONS] + [
    (option, dtype) for option in ("plain", "all") for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Three blocks of rows and four of the vocabulary, the last ones ragged; too small to share between threads."""
    monkeypatch.setattr(tiling, "logprobs_tile_shape", lambda device: (16, 16))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(dtype=torch.float32, *, n=N, ignored=0.0, spread=1.0, bias=False, seed=0):
    """Random (hidden, weight, targets, bias) with logits of standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, H, generator=generator, dtype=torch.float64) * spread
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64) / H**0.5
    targets = torch.randint(V, (n,), generator=generator)
    targets[torch.randperm(n, generator=generator)[: round(ignored * n)]] = -100
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), targets, bias


def evaluate(function, hidden, weight, targets, bias=None, *, frozen=False, **options):
    """Outputs of `function`, then the gradients of a fixed weighted sum of them in hidden, weight and bias."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    if frozen:
        leaves[1:] = weight, bias
    out = function(leaves[0], leaves[1], targets, bias=leaves[2], **options)
    out = out if isinstance(out, tuple) else (out,)
    coefficients = torch.linspace(-1, 2, targets.numel()).view(targets.shape)
    total = sum(((1 + i) * coefficients * o).sum() for i, o in enumerate(out))
    grads = torch.autograd.grad(total, [t for t in leaves if t is not None and t.requires_grad])
    return [o.detach() for o in out], list(grads)


def fast(*args, **options):
    return linear_logprobs(*args, backend="torch", **options)


def assert_within_budget(actual, plain, exact, eps):
    """|actual - exact| <= 2 (|plain - exact| + eps max|exact|), where plain is the reference in the low precision."""
    for a, p, e in zip(actual, plain, exact, strict=True):
        budget = 2 * ((p - e).abs().max() + eps * e.abs().max())
        assert (a - e).abs().max() <= budget


def check_against_float64(inputs, *, frozen, memory_budget, **options):
    """Outputs within float32's budget, gradients within that of their own dtype, which probabilities are kept in."""
    doubles = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    outputs, grads = evaluate(fast, *inputs, frozen=frozen, memory_budget=memory_budget, **options)
    plain_outputs, plain_grads = evaluate(reference.linear_logprobs, *inputs, frozen=frozen, **options)
    exact_outputs, exact_grads = evaluate(reference.linear_logprobs, *doubles, frozen=frozen, **options)
    dtype = inputs[0].dtype
    assert all(o.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for o in outputs)
    assert all(g.dtype == dtype for g in grads)
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:  # the reference is no truer than this: H rounded additions make a logit or a gradient
        eps *= H
    assert_within_budget(outputs, plain_outputs, exact_outputs, min(eps, EPS))
    assert_within_budget(grads, plain_grads, exact_grads, eps)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize(("option", "dtype"), OPTIONS_AND_DTYPES, ids=str)
def test_error_budget(option, entropy, dtype, budget):
    options = dict(OPTIONS[option])
    inputs = problem(dtype, ignored=0.3, bias=options.pop("bias", False))
    check_against_float64(inputs, frozen=budget == "frozen", memory_budget=BUDGETS[budget], entropy=entropy, **options)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_logits_up_to_60(entropy, dtype, budget):
    hidden, weight, targets, _ = problem(dtype)
    hidden = (hidden * (60 / (hidden.float() @ weight.float().t()).abs().max())).to(dtype)
    targets[0] = (hidden.float() @ weight.float().t())[0].argmin()
    check_against_float64(
        (hidden, weight, targets), frozen=budget == "frozen", memory_budget=BUDGETS[budget], entropy=entropy
    )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_masked_vocabulary_entries(softcap, entropy, budget):
    hidden, weight, targets, bias = problem(bias=True)
    bias[:18] = bias[40] = -math.inf  # the whole first tile, and more
    targets = 18 + targets % 20
    frozen = budget == "frozen"
    options = {"frozen": frozen, "memory_budget": BUDGETS[budget], "entropy": entropy, "softcap": softcap}
    check_against_float64((hidden, weight, targets, bias), **options)
    outputs, grads = evaluate(fast, hidden, weight, targets, bias, **options)
    assert all(t.isfinite().all() for t in outputs + grads)
    if softcap is None and not frozen:
        assert not grads[1][:18].any() and not grads[2][:18].any()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("softcap", [3.0, 30.0, 1e3, 1e6, 1e8])
def test_a_loose_cap_changes_nothing(backend, softcap, isa):
    """The error of a logit must not grow with its cap: c tanh(u / c) is u where c is large."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(16, 64, generator=generator), torch.randn(500, 64, generator=generator) / 8
    targets = torch.randint(500, (16,), generator=generator)
    options = {"softcap": softcap, "backend": backend}
    exact = evaluate(reference.linear_logprobs, hidden.double(), weight.double(), targets, softcap=softcap)
    found = evaluate(linear_logprobs, hidden, weight, targets, **options)
    for outputs, expected in zip(found, exact, strict=True):
        for a, e in zip(outputs, expected, strict=True):
            assert (a - e).abs().max() <= 16 * EPS * max(e.abs().max(), 1)


@pytest.mark.parametrize("budget", BUDGETS)
def test_masked_target(budget):
    hidden, weight, targets, bias = problem(bias=True)
    targets[5], bias[targets[5]] = 20, -math.inf
    bias[20] = -math.inf
    (logprobs,), grads = evaluate(
        fast, hidden, weight, targets, bias, frozen=budget == "frozen", memory_budget=BUDGETS[budget]
    )
    assert logprobs[5] == -math.inf and logprobs[targets != 20].isfinite().any()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_confident_rows_keep_their_relative_accuracy(dtype, budget):
    """With p_y near 1 the log-prob and the gradient are tiny, and lost unless the target is kept apart in the sums."""
    weight = torch.nn.functional.normalize(problem(torch.float64)[1], dim=1).to(dtype)
    targets, size = torch.arange(40), torch.linspace(4, 60, 40, dtype=torch.float64)
    hidden = (weight[targets].double() * size.unsqueeze(1)).to(dtype)
    (logprobs,), grads = evaluate(
        fast, hidden, weight, targets, frozen=budget == "frozen", memory_budget=BUDGETS[budget]
    )
    w, coefficients = weight.double(), torch.linspace(-1, 2, 40).double()
    others = (hidden.double() @ w.t()).softmax(1).scatter(1, targets.unsqueeze(1), 0.0)
    doubt = others.sum(1)  # 1 - p_y, without the subtraction
    assert doubt.min() < EPS / 1000
    # H products make a logit, V exponentials a sum. A logit is off by H eps |h| |w|, a probability by twice that.
    eps = min(EPS, torch.finfo(dtype).eps)
    relative = (2 * H * size * 1.02 + V + 8) * eps
    assert ((logprobs - torch.log1p(-doubt)).abs() <= 2 * doubt * relative).all()
    # The gradient sums p_j (W_y - W_j), each of length 2 or less, with every p_j kept in dtype, at worst subnormal.
    exact = coefficients.unsqueeze(1) * (doubt.unsqueeze(1) * w[targets] - others @ w)
    low = torch.finfo(dtype)
    step = low.smallest_normal * low.eps
    bound = coefficients.abs() * (2.04 * doubt * (relative + low.eps) + V * step) + step
    assert ((grads[0] - exact).abs().amax(1) <= bound).all()


@pytest.mark.parametrize("budget", ["cached", "partly cached", "recomputed"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_gradcheck(entropy, budget, monkeypatch):
    monkeypatch.setattr(tiling, "logprobs_tile_shape", lambda device: (16, 3))
    options = {"logit_scale": -0.6, "softcap": 3.0, "temperature": 0.7}
    hidden, weight, targets, bias = problem(torch.float64, n=19, ignored=0.1, bias=True)
    hidden, weight, bias, targets = hidden[:, :2], weight[:7, :2], bias[:7], targets.clamp(max=6)
    memory_budget = 16 * 7 * 8 if budget == "partly cached" else BUDGETS[budget]

    def outputs(hidden, weight, bias):
        out = fast(hidden, weight, targets, bias=bias, entropy=entropy, memory_budget=memory_budget, **options)
        return out if entropy else (out,)

    leaves = [t if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(outputs, leaves, check_undefined_grad=False)
    assert torch.autograd.gradcheck(outputs, [leaves[0], weight, bias], check_undefined_grad=False)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_each_gradient_alone(wanted):
    inputs = dict(zip(("hidden", "weight", "targets", "bias"), problem(torch.float64, bias=True), strict=True))
    inputs[wanted].requires_grad_()
    grads = [
        torch.autograd.grad(function(**inputs).square().sum(), inputs[wanted])[0]
        for function in (linear_logprobs, reference.linear_logprobs)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 16, 33])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_any_number_of_rows(n, entropy, budget):
    hidden, weight, targets, bias = problem(n=n, bias=True)
    frozen = budget == "frozen"
    options = {"frozen": frozen, "entropy": entropy}
    outputs, grads = evaluate(fast, hidden, weight, targets, bias, memory_budget=BUDGETS[budget], **options)
    expected = evaluate(reference.linear_logprobs, hidden, weight, targets, bias, **options)
    assert [t.shape for t in outputs] == [t.shape for t in expected[0]]
    assert [t.shape for t in grads] == [t.shape for t in expected[1]]
    if n:
        check_against_float64((hidden, weight, targets, bias), memory_budget=BUDGETS[budget], **options)
    else:
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_ignored_rows_hold_anything_and_change_nothing(ignored, entropy, budget):
    hidden, weight, targets, bias = problem(ignored=ignored, bias=True)
    kept = targets >= 0
    poisoned = hidden.clone()
    poisoned[~kept] = torch.tensor([math.nan, math.inf, -math.inf] * (H // 3))
    options = {"frozen": budget == "frozen", "entropy": entropy, "memory_budget": BUDGETS[budget]}
    outputs, grads = evaluate(fast, poisoned, weight, targets, bias, **options)
    clean_outputs, clean_grads = evaluate(fast, hidden, weight, targets, bias, **options)
    assert all(map(torch.equal, outputs + grads, clean_outputs + clean_grads))
    assert not any(o[~kept].any() for o in outputs) and not grads[0][~kept].any()
    assert all(o[kept].all() for o in outputs) and kept.sum() == N - round(ignored * N)
    if ignored < 1:
        check_against_float64((hidden, weight, targets, bias), **options)
    else:
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_without_an_ignore_index_every_row_counts(backend):
    hidden, weight, targets, _ = problem()
    logprobs = linear_logprobs(hidden, weight, targets, ignore_index=None, entropy=True, backend=backend)
    for ours, plain in zip(logprobs, reference.linear_logprobs(hidden, weight, targets, entropy=True), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    targets[3] = -100
    if backend != "reference":
        with pytest.raises(InputError, match=r"holds -100, .* give token ids in \[0, 53\)$"):
            linear_logprobs(hidden, weight, targets, ignore_index=None, backend=backend)


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_gradients_without_an_ignore_index_are_those_with_one_that_no_row_has(backend, budget, entropy):
    inputs = problem(bias=True)
    options = {"frozen": budget == "frozen", "memory_budget": BUDGETS[budget], "entropy": entropy, "backend": backend}
    expected = evaluate(linear_logprobs, *inputs, **options)
    outputs, grads = evaluate(linear_logprobs, *inputs, ignore_index=None, **options)
    assert all(map(torch.equal, outputs + grads, expected[0] + expected[1]))


def test_another_ignore_index():
    hidden, weight, targets, _ = problem()
    targets[3:9] = 0
    logprobs = fast(hidden, weight, targets, ignore_index=0)
    assert torch.equal(logprobs == 0, targets == 0)
    assert torch.equal(logprobs[targets != 0], fast(hidden, weight, targets)[targets != 0])


@pytest.mark.parametrize("budget", ["frozen", "cached", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "threads"), [((16, 16), 1), ((512, 4096), 2)], ids=["small tiles", "real tiles"])
def test_a_row_is_the_same_bits_in_any_batch(shape, threads, dtype, budget, monkeypatch):
    monkeypatch.setattr(tiling, "logprobs_tile_shape", lambda device: shape)
    torch.set_num_threads(threads)
    hidden, weight, targets, _ = problem(dtype, n=100)

    def run(rows):
        leaf, head = hidden[rows].clone().requires_grad_(), weight.clone().requires_grad_(budget != "frozen")
        logprobs = fast(leaf, head, targets[rows], memory_budget=BUDGETS[budget])
        logprobs.sum().backward()
        entropy = fast(hidden[rows], weight, targets[rows], entropy=True)[1]
        return logprobs.detach(), entropy, leaf.grad

    together = run(slice(0, 100))
    for row in (0, 15, 57, 99):
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(run(slice(row, row + 1)), together, strict=True))
    assert all(torch.equal(a, b[20:57]) for a, b in zip(run(slice(20, 57)), together, strict=True))
    assert all(map(torch.equal, run(slice(0, 100)), together))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_strides_and_leading_dimensions(frozen):
    hidden, weight, targets, bias = problem(torch.float64, n=36, ignored=0.2, bias=True)
    (expected,), expected_grads = evaluate(fast, hidden, weight, targets, bias, frozen=frozen)
    apart = [t.repeat_interleave(2, 0)[::2] for t in (hidden.t(), weight.t(), targets, bias)]
    strided = apart[0].t().view(36, H), apart[1].t(), apart[2], apart[3]
    assert not any(t.is_contiguous() for t in strided)
    (logprobs,), grads = evaluate(fast, *strided, frozen=frozen)
    torch.testing.assert_close([logprobs, *grads], [expected, *expected_grads], rtol=1e-13, atol=1e-13)

    (logprobs,), grads = evaluate(fast, hidden.view(3, 12, H), weight, targets.view(3, 12), bias, frozen=frozen)
    assert logprobs.shape == (3, 12) and grads[0].shape == (3, 12, H)
    grads[0] = grads[0].view(36, H)
    assert all(map(torch.equal, [logprobs.view(36), *grads], [expected, *expected_grads]))
    assert fast(hidden[0], weight, targets[0]).shape == ()


def test_mixed_dtypes_use_the_wider():
    hidden, weight, targets, _ = problem()
    low = weight.bfloat16()
    assert torch.equal(fast(hidden, low, targets), fast(hidden, low.float(), targets))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_autocast_does_not_round_the_products(backend, budget):
    def run(*args, **options):
        return linear_logprobs(*args, backend=backend, memory_budget=BUDGETS[budget], **options)

    inputs = problem()[:3]
    expected = evaluate(run, *inputs, frozen=budget == "frozen")
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(run, *inputs, frozen=budget == "frozen")
        logits = reference.linear_logits(*inputs[:2])
    for ours, theirs in zip(found, expected, strict=True):  # outputs, then gradients
        assert all(map(torch.equal, ours, theirs))
    assert torch.equal(logits, reference.linear_logits(*inputs[:2]))


def test_reference_and_auto_backends():
    inputs = problem(torch.float64)[:3]
    assert torch.equal(linear_logprobs(*inputs, backend="reference"), reference.linear_logprobs(*inputs))
    torch.testing.assert_close(linear_logprobs(*inputs), reference.linear_logprobs(*inputs), rtol=1e-13, atol=1e-13)


def test_no_grad_and_frozen_inputs_need_no_graph():
    hidden, weight, targets, _ = problem()
    assert not fast(hidden, weight, targets).requires_grad
    with torch.no_grad():
        assert not fast(hidden.requires_grad_(), weight, targets).requires_grad


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_second_derivatives_are_refused_not_wrong(frozen):
    hidden, weight, targets, _ = problem()
    hidden.requires_grad_()
    logprobs = fast(hidden, weight.requires_grad_(not frozen), targets)
    (grad,) = torch.autograd.grad(logprobs.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_compiles_in_one_graph_to_the_same_bits(entropy, frozen):
    hidden, weight, targets, bias = problem(ignored=0.3, bias=True)

    def run(*args, **options):
        return linear_logprobs(*args, entropy=entropy, memory_budget=16 * ROW_BYTES, backend="torch", **options)

    eager = evaluate(run, hidden, weight, targets, bias, frozen=frozen)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled = evaluate(compiled, hidden, weight, targets, bias, frozen=frozen)
    assert all(map(torch.equal, compiled[0] + compiled[1], eager[0] + eager[1]))


@pytest.mark.parametrize(("grads", "cache_rows"), [(True, 0), (False, 32), (False, 0)])
def test_opcheck(grads, cache_rows):
    hidden, weight, targets, bias = problem(n=32, ignored=0.4, bias=True)
    entropy = not cache_rows
    args = (hidden, weight, targets, bias, 1.3, 5.0, 0.7, -100, grads, entropy, cache_rows)
    torch.library.opcheck(torch.ops.fastalign.linear_logprobs.default, args)
    *_, stats, cache, shifts = torch.ops.fastalign.linear_logprobs(*args)
    g_logprobs, g_entropy = torch.ones(32), torch.ones(32) if entropy else None
    args = (g_logprobs, g_entropy, hidden, weight, targets, bias, stats, cache, shifts, *args[4:8], [True, True, True])
    torch.library.opcheck(torch.ops.fastalign.linear_logprobs_backward.default, args)


def wrong(name):
    """One broken argument, and what its sentence must hold: the value found, what is expected, the remedy."""
    hidden, weight, targets, bias = problem(bias=True)
    arguments, *words = {
        "hidden is integer": ({"hidden": hidden.long()}, "hidden is torch.int64", "floating", "dequantise"),
        "weight is quantised": ({"weight": weight.to(torch.int8)}, "weight is torch.int8", "floating", "dequantise"),
        "weight is transposed": ({"weight": weight.t()}, "(37, 24)", "(24, 53)", "(..., H) and (V, H)"),
        "weight is flat": ({"weight": weight[0]}, "(24,)", "(V, H)"),
        "targets are int32": ({"targets": targets.int()}, "torch.int32", "int64", "targets.long()"),
        "targets are too few": ({"targets": targets[1:]}, "(36,)", "(37,)"),
        "target is V": ({"targets": targets.index_fill(0, torch.tensor([4]), V)}, "53", "[0, 53)", "-100"),
        "target is -1": ({"targets": targets.index_fill(0, torch.tensor([4]), -1)}, "-1", "[0, 53)", "-100"),
        "bias is short": ({"bias": bias[1:]}, "(52,)", "(53,)"),
        "bias is integer": ({"bias": bias.long()}, "torch.int64", "floating"),
        "devices differ": ({"weight": weight.to("meta")}, "cpu", "meta", "one device"),
        "softcap is 0": ({"softcap": 0.0}, "softcap is 0.0", "above 0", "None"),
        "temperature is 0": ({"temperature": 0.0}, "temperature is 0.0", "above 0"),
        "temperature is nan": ({"temperature": math.nan}, "temperature is nan", "above 0"),
        "memory_budget is -1": ({"memory_budget": -1}, "memory_budget is -1", "bytes", "0"),
    }[name]
    return {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias} | arguments, words


@pytest.mark.parametrize(
    "name",
    [
        "hidden is integer", "weight is quantised", "weight is transposed", "weight is flat", "targets are int32",
        "targets are too few", "target is V", "target is -1", "bias is short", "bias is integer", "devices differ",
        "softcap is 0", "temperature is 0", "temperature is nan", "memory_budget is -1",
    ],
)  # fmt: skip
def test_errors_say_what_was_found_and_what_to_do(name):
    arguments, words = wrong(name)
    with pytest.raises(InputError) as error:
        linear_logprobs(**arguments, backend="torch")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_backend_lists_the_known():
    with pytest.raises(BackendError, match=r"'tpu'.*auto, reference, torch"):
        linear_logprobs(*problem()[:3], backend="tpu")


@pytest.mark.parametrize(("hidden_length", "target_length"), [(5, 4), (4, 5)], ids=["hidden is not", "targets are not"])
def test_lengths_that_differ_by_one_name_the_shift(hidden_length, target_length):
    hidden, targets = torch.randn(2, hidden_length, H), torch.zeros(2, target_length, dtype=torch.int64)
    with pytest.raises(InputError) as error:
        linear_logprobs(hidden, torch.randn(V, H), targets)
    said = str(error.value)
    assert f"targets is (2, {target_length})" in said and f"(2, {hidden_length})" in said
    assert "targets[..., t] is the token that hidden[..., t] predicts" in said
    assert said.endswith("pass hidden[..., :-1, :]" if hidden_length > target_length else "pass targets[..., 1:]")


@pytest.mark.parametrize("shape", [(2, 3), (3, 5), (10,), (2, 7)], ids=str)
def test_lengths_that_differ_otherwise_do_not(shape):
    with pytest.raises(InputError) as error:
        linear_logprobs(torch.randn(2, 5, H), torch.randn(V, H), torch.zeros(shape, dtype=torch.int64))
    assert f"targets is {shape}" in str(error.value) and "predicts" not in str(error.value)
