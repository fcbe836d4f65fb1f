"""selective_logprobs, C++ and torch, against the float64 reference; with several chunks even of small logits."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from fastalign import reference, selective_logprobs
from fastalign.errors import BackendError, InputError
from fastalign.ops.backends import cpu

N, V = 23, 31
ISAS = cpu.describe()["kernels_available"]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["torch", *ISAS])
def backend(request):
    """The torch backend, and "cpu" with the kernels of each instruction set that this machine runs."""
    if request.param == "torch":
        yield "torch"
        return
    cpu.select(request.param)
    yield "cpu"
    cpu.select(None)


def test_the_kernels_are_built():
    """Else most tests below would pass by doing nothing."""
    assert "plain" in ISAS


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of four rows, so that there are six."""
    monkeypatch.setattr(sys.modules["fastalign.ops.selective_logprobs"], "_CHUNK", 4 * V)


def problem(dtype=torch.float32, ignored=0.3, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64) * spread
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[: round(ignored * N)]] = -100
    return logits.to(dtype), targets


def evaluate(function, logits, targets, **options):
    logits = logits.detach().clone().requires_grad_()
    logprobs = function(logits, targets, **options)
    (logprobs * torch.linspace(-1, 2, targets.numel()).view(targets.shape)).sum().backward()
    return logprobs.detach(), logits.grad


@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(backend, dtype, temperature, ignored):
    """|ours - exact| <= 2 (|reference in the low precision - exact| + eps max|exact|)."""
    logits, targets = problem(dtype, ignored)
    ours = evaluate(selective_logprobs, logits, targets, temperature=temperature, backend=backend)
    plain = evaluate(reference.selective_logprobs, logits, targets, temperature=temperature)
    exact = evaluate(reference.selective_logprobs, logits.double(), targets, temperature=temperature)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert ours[0].dtype == computed and ours[1].dtype == dtype
    for a, p, e, eps in zip(ours, plain, exact, (torch.finfo(computed).eps, torch.finfo(dtype).eps), strict=True):
        roundings = V if dtype == torch.float64 else 1  # the reference is no truer: V rounded additions make a sum
        assert (a - e).abs().max() <= 2 * ((p - e).abs().max() + roundings * eps * e.abs().max())
    assert not ours[0][targets < 0].any() and not ours[1][targets < 0].any()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(backend, temperature):
    logits, targets = problem(torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: selective_logprobs(z, targets[:9], temperature=temperature, backend=backend),
        logits[:9].requires_grad_(),
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_ignored_rows_hold_anything_and_change_nothing(backend, poison):
    logits, targets = problem()
    poisoned = logits.masked_fill((targets < 0).unsqueeze(1), poison)
    assert all(map(torch.equal, evaluate(selective_logprobs, poisoned, targets, backend=backend),
                   evaluate(selective_logprobs, logits, targets, backend=backend)))  # fmt: skip


def test_masked_vocabulary_entries_and_large_logits(backend):
    logits, targets = problem(ignored=0.0, spread=60.0)
    logits[:, ::5] = -math.inf
    targets = torch.where(targets % 5 == 0, targets + 1, targets).clamp(max=V - 2)
    logprobs, grad = evaluate(selective_logprobs, logits, targets, backend=backend)
    exact, exact_grad = evaluate(reference.selective_logprobs, logits.double(), targets)
    assert logprobs.isfinite().all() and not grad[:, ::5].any()
    eps = torch.finfo(torch.float32).eps
    largest = logits[logits.isfinite()].abs().max()
    # z_y and logsumexp are each rounded at the size of the logits, and so is z - logsumexp before its exponential.
    assert (logprobs - exact).abs().max() <= 4 * eps * largest
    assert (grad - exact_grad).abs().max() <= 2 * 4 * eps * largest


def test_no_second_copy_of_the_logits(backend):
    """What the backward pass keeps is the logits it was given, and three numbers a row."""
    logits, targets = problem()
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        selective_logprobs(logits, targets, backend=backend)
    assert sum(t.numel() for t in kept if t.data_ptr() != logits.data_ptr()) == 3 * N


def test_shapes_and_strides(backend):
    logits, targets = problem(torch.float64, ignored=0.0)
    expected = evaluate(selective_logprobs, logits, targets, backend=backend)
    strided = logits.t().contiguous().t()
    assert not strided.is_contiguous()
    torch.testing.assert_close(
        evaluate(selective_logprobs, strided, targets, backend=backend), expected, rtol=1e-13, atol=1e-13
    )
    cube = evaluate(selective_logprobs, logits[:20].view(4, 5, V), targets[:20].view(4, 5), backend=backend)
    assert cube[0].shape == (4, 5) and torch.equal(cube[0].view(20), expected[0][:20])
    assert selective_logprobs(logits[:0], targets[:0], backend=backend).shape == (0,)
    assert selective_logprobs(logits[0], targets[0], backend=backend).shape == ()


def test_reference_backend_and_another_ignore_index():
    logits, targets = problem(ignored=0.0)
    targets[:5] = 7
    by_reference = selective_logprobs(logits, targets, ignore_index=7, backend="reference")
    assert torch.equal(by_reference, reference.selective_logprobs(logits, targets, ignore_index=7))
    assert torch.equal(selective_logprobs(logits, targets, ignore_index=7) == 0, targets == 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.zeros(N, V, dtype=torch.int64)}, ("logits is torch.int64", "floating")),
        ({"targets": torch.zeros(N - 1, dtype=torch.int64)}, ("(22,)", "(23,)")),
        ({"targets": torch.zeros(N)}, ("torch.float32", "int64")),
        ({"targets": torch.full((N,), V)}, ("31", "[0, 31)", "ignore_index=-100")),
        ({"targets": torch.full((N,), -1)}, ("-1", "[0, 31)", "ignore_index=-100")),
        ({"temperature": -1.0}, ("temperature is -1.0", "above 0")),
        ({"temperature": math.inf}, ("temperature is inf", "finite")),
        ({"targets": torch.zeros(N, dtype=torch.int64, device="meta")}, ("cpu", "meta", "one device")),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else next(iter(value)),
)
def test_errors_say_what_was_found_and_what_to_do(backend, change, words):
    logits, targets = problem()
    with pytest.raises(InputError) as error:
        selective_logprobs(**({"logits": logits, "targets": targets, "backend": backend} | change))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_backend_lists_the_known():
    with pytest.raises(BackendError, match=r"'tpu'.*auto, reference, torch, cpu"):
        selective_logprobs(*problem(), backend="tpu")


def test_a_backend_that_cannot_run_says_why():
    logits, targets = problem()
    with pytest.raises(BackendError, match=r"backend='cpu'.*meta"):
        selective_logprobs(logits.to("meta"), targets.to("meta"), backend="cpu")
    with pytest.raises(InputError, match="float8_e4m3fn"):
        selective_logprobs(logits.to(torch.float8_e4m3fn), targets, backend="cpu")


def many(n, vocab, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=generator) * 3
    return logits.to(dtype), torch.randint(vocab, (n,), generator=generator)


def assert_within_budget(logits, targets, backend):
    """log-probs lie within eps of themselves and of the logits; gradients within 8 eps, and the dtype's rounding."""
    logprobs, grad = evaluate(selective_logprobs, logits, targets, backend=backend)
    exact, exact_grad = evaluate(reference.selective_logprobs, logits.double(), targets)
    assert (logprobs - exact).abs().max() <= 4 * EPS * logits.abs().max().clamp(min=1)
    rounding = 0 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps
    assert (grad - exact_grad).abs().max() <= (64 * EPS + rounding) * exact_grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 63, 1023, 1024, 1025, 5003])
def test_vocabularies_around_the_blocks(backend, vocab, dtype):
    logits, targets = many(3, vocab, dtype)
    targets[0], targets[1] = 0, vocab - 1
    assert_within_budget(logits, targets, backend)


def test_many_short_rows(backend):
    assert_within_budget(*many(100_000, 11), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_threads_nor_the_batch_change_a_bit(backend, threads, dtype):
    """Rows enough for several shares of 2^16 logits, and one alone."""
    logits, targets = many(100, 3001, dtype)
    targets[::7] = -100
    results = []
    for count in (1, 2, 8):
        threads(count)
        results.append(evaluate(selective_logprobs, logits, targets, backend=backend))
    for other in results[1:]:
        assert backend == "torch" or all(map(torch.equal, results[0], other))
    alone = selective_logprobs(logits[3:4].clone(), targets[3:4], backend=backend)
    assert torch.equal(alone, results[0][0][3:4])


def test_near_certain_targets_lose_no_digits(backend):
    """log p_y = -log1p(exp(-x)) and 1 - p_y with x up to 80: plain softmax gives 0 for both from x = 17 on."""
    x = torch.arange(-80.0, 81.0, 5)
    logits = torch.stack([x, torch.full_like(x, -math.log(2)), torch.full_like(x, -math.log(2))], 1)
    leaf = logits.clone().requires_grad_()
    logprobs = selective_logprobs(leaf, torch.zeros(len(x), dtype=torch.int64), backend=backend)
    (grad,) = torch.autograd.grad(logprobs.sum(), leaf)
    odds = logits[:, 0].double() - logits[:, 1:].double().logsumexp(1)
    exact, miss = torch.nn.functional.logsigmoid(odds), torch.sigmoid(-odds)
    error = 4 * EPS * (odds.abs() + 1)  # the odds are rounded, and an error there is a factor in 1 - p_y
    assert ((logprobs - exact).abs() <= error * exact.abs()).all()
    assert ((grad[:, 0] - miss).abs() <= error * miss).all()
    assert ((grad[:, 1] + miss / 2).abs() <= error * miss).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 1500])
def test_a_target_that_overflowed_is_not_certain(backend, dtype, vocab):
    """A logit of +inf has no probability. 1 without a gradient would make a model that diverged look perfect."""
    logits = torch.zeros(2, vocab, dtype=dtype)
    logits[0, 0] = math.inf
    leaf = logits.requires_grad_()
    logprobs = selective_logprobs(leaf, torch.tensor([0, 0]), backend=backend)
    (grad,) = torch.autograd.grad(logprobs.sum(), leaf)
    assert logprobs[0].isnan() and grad[0].isnan().all() and logprobs[1].isfinite() and grad[1].isfinite().all()


def test_infinite_logits(backend):
    inf = math.inf
    logits = torch.tensor([[-inf, 1.0, -inf], [0.5, -inf, -inf], [-inf, 2.0, 2.0], [math.nan, 0.0, 0.0], [-inf] * 3])
    leaf = logits.clone().requires_grad_()
    logprobs = selective_logprobs(leaf, torch.tensor([1, 0, 0, 1, 0]), backend=backend)
    assert logprobs[:3].tolist() == [0.0, 0.0, -inf] and logprobs[3:].isnan().all()
    (grad,) = torch.autograd.grad(logprobs.sum(), leaf)
    assert grad[:3].tolist() == [[0.0] * 3, [0.0] * 3, [1.0, -0.5, -0.5]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_layout_gives_the_same_bits(backend, dtype):
    logits, targets = many(24, 77, dtype)
    expected = evaluate(selective_logprobs, logits, targets, backend=backend)
    wide = torch.full((4, 8, 80), 9.0, dtype=dtype)
    wide[:, :6, 2:79] = logits.view(4, 6, 77)
    weights = torch.linspace(-1, 2, 24)
    for view in (wide[:, :6, 2:79], logits.t().contiguous().t().view(1, 24, 77), logits.view(2, 2, 6, 77)):
        leaf = view.detach().requires_grad_()
        got = selective_logprobs(leaf, targets.view(view.shape[:-1]), backend=backend)
        (grad,) = torch.autograd.grad((got.reshape(-1) * weights).sum(), leaf)
        assert torch.equal(got.reshape(-1), expected[0]) and torch.equal(grad.reshape(24, 77), expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_may_take_the_logits_place(backend, dtype):
    values, targets = problem(dtype)
    _, want = evaluate(selective_logprobs, values, targets, temperature=0.7, backend=backend)
    leaf = values.clone().requires_grad_()
    logits = leaf * 1.0
    address = logits.data_ptr()
    logprobs = selective_logprobs(logits, targets, temperature=0.7, inplace_backward=True, backend=backend)
    loss = (logprobs * torch.linspace(-1, 2, N)).sum()
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(grad, want) and grad.data_ptr() == address
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_logits_that_others_need_are_not_overwritten_unseen(backend):
    values, targets = problem(ignored=0.0)
    logits = values.requires_grad_().tanh()  # saves its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        selective_logprobs(logits, targets, inplace_backward=True, backend=backend).sum().backward()


def test_logits_with_gaps_are_left_alone(backend):
    values, targets = problem()
    wide = torch.cat([values, values], 1).requires_grad_()
    before = wide.detach().clone()
    selective_logprobs(wide[:, :V], targets, inplace_backward=True, backend=backend).sum().backward()
    assert torch.equal(wide.detach(), before)


def test_a_gradient_too_large_for_the_caches(backend, monkeypatch):
    monkeypatch.setattr(cpu, "_STREAMED_BYTES", 0)
    for dtype in (torch.float32, torch.bfloat16):
        assert_within_budget(*many(5, 1031, dtype), backend)


def test_opcheck(backend):
    logits, targets = problem()
    options = (0.7, -100, backend)
    torch.library.opcheck(torch.ops.fastalign.selective_logprobs.default, (logits, targets, *options))
    grad, stats = torch.ops.fastalign.selective_logprobs(logits, targets, *options)
    arguments = (grad, logits, targets, stats, *options)
    torch.library.opcheck(torch.ops.fastalign.selective_logprobs_backward.default, arguments)
    torch.library.opcheck(torch.ops.fastalign.selective_logprobs_backward_.default, arguments)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_in_one_graph(backend, in_place):
    logits, targets = problem()

    def run(z):
        return selective_logprobs(z * 1.0, targets, inplace_backward=in_place, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        leaf = logits.clone().requires_grad_()
        out = function(leaf)
        results.append([out, *torch.autograd.grad((out * torch.linspace(-1, 2, N)).sum(), leaf)])
    assert all(map(torch.equal, *results))


def test_auto_takes_the_kernels_where_they_are_fast():
    logits, targets = many(7, 3001)
    for isa in ISAS:
        cpu.select(isa)
        want = selective_logprobs(logits, targets, backend="torch" if isa == "plain" else "cpu")
        assert torch.equal(selective_logprobs(logits, targets), want)
    cpu.select(None)
