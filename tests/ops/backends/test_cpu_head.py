"""The C++ kernels: every instruction set this machine runs, by name, against float64; threads, batches, layouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastalign import linear_logprobs, reference
from fastalign.errors import BackendError, InputError
from fastalign.ops.backends import cpu, cpu_head

ROOT = Path(__file__).parents[3]
EPS = torch.finfo(torch.float32).eps
ISAS = cpu.describe()["kernels_available"]
# More than one tile (256) and chunk (2048) of the vocabulary, a multiple of neither; more than one panel (64) of rows.
N, H, V = 150, 37, 2311
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"logit_scale": -0.6, "temperature": 0.7},
    "capped": {"bias": True, "softcap": 5.0, "logit_scale": 1.3},
}
BUDGETS = {"frozen": None, "kept": 1 << 30, "partly kept": 100 * V * 4, "recomputed": 0}


def test_the_kernels_are_built():
    """Else every test below would pass by doing nothing."""
    assert "plain" in ISAS


def problem(dtype=torch.float32, *, n=N, width=H, vocab=V, spread=3.0, bias=False, seed=0):
    """Random (hidden, weight, targets, bias), logits of standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator) * spread
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    targets = torch.randint(vocab, (n,), generator=generator)
    bias = torch.randn(vocab, generator=generator).to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), targets, bias


def evaluate(function, hidden, weight, targets, bias, *, entropy=False, frozen=False, **options):
    """[log-probs, entropies?, gradients of a fixed weighted sum of them in hidden, weight, bias]."""
    hidden = hidden.detach().clone().requires_grad_()
    others = [t for t in (weight, bias) if t is not None]
    if not frozen:
        others = [t.detach().clone().requires_grad_() for t in others]
    out = function(hidden, others[0], targets, bias=others[1] if bias is not None else None, entropy=entropy, **options)
    outs = out if entropy else (out,)
    loss = sum((o * torch.linspace(-1, 1.7, o.numel(), dtype=o.dtype)).sum() for o in outs)
    grads = torch.autograd.grad(loss, [hidden, *([] if frozen else others)])
    return [o.detach() for o in outs], list(grads)


def logit_error(hidden, weight):
    """A bound on the error of a float32 logit before cap and temperature, and of its logsumexp: H roundings."""
    return 2 * (hidden.shape[1] + 8) * EPS * (hidden.double().abs() @ weight.double().abs().T).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_values_and_gradients_against_float64(isa, dtype, head, budget):
    options = dict(HEADS[head])
    inputs = problem(dtype, bias=options.pop("bias", False))
    truth, true_grads = evaluate(
        reference.linear_logprobs, *(t if t is None or not t.is_floating_point() else t.double() for t in inputs),
        frozen=budget == "frozen", **options,
    )  # fmt: skip
    found, grads = evaluate(
        linear_logprobs, *inputs, frozen=budget == "frozen", memory_budget=BUDGETS[budget], backend="cpu", **options
    )
    eps = torch.finfo(torch.float64).eps / EPS if dtype == torch.float64 else 1.0
    slope = abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
    error = logit_error(*inputs[:2]) * slope * eps + (EPS * eps * 40 if "softcap" in options else 0)
    assert (found[0] - truth[0]).abs().max() <= 2 * error
    # Every probability is off by that much at most, relatively; sums over rows or vocabulary add roundings; results,
    # and kept probabilities, are rounded to the inputs' dtype.
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0
    for got, want in zip(grads, true_grads, strict=True):
        budgeted = (4 * error + V * EPS * eps + rounding) * want.abs().max()
        assert (got.double() - want).abs().max() <= budgeted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_within_1e_4_at_logits_of_60(isa, dtype):
    hidden, weight, targets, _ = problem(dtype, width=576, spread=15.0)
    z = reference.linear_logits(hidden.double(), weight.double())
    assert 55 < z.abs().max() < 90
    truth = reference.linear_logprobs(hidden.double(), weight.double(), targets)
    assert (linear_logprobs(hidden, weight, targets, backend="cpu") - truth).abs().max() < 1e-4


@pytest.mark.parametrize("head", ["bias", "capped"])
@pytest.mark.parametrize("frozen", [True, False])
def test_entropy_and_its_gradient(isa, head, frozen):
    options = dict(HEADS[head])
    inputs = problem(bias=options.pop("bias"))
    doubles = (inputs[0].double(), inputs[1].double(), inputs[2], inputs[3].double())
    truth, true_grads = evaluate(reference.linear_logprobs, *doubles, entropy=True, frozen=frozen, **options)
    found, grads = evaluate(linear_logprobs, *inputs, entropy=True, frozen=frozen, backend="cpu", **options)
    error = logit_error(*inputs[:2]) * options.get("logit_scale", 1.0) + 40 * EPS
    spread = truth[1].max() + 30  # the entropy weighs an error of p by log p
    assert (found[1] - truth[1]).abs().max() <= spread * error
    for got, want in zip(grads, true_grads, strict=True):
        assert (got - want).abs().max() <= spread * (4 * error + V * EPS) * want.abs().max()


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_confident_row_keeps_the_digits_of_its_small_gradient(isa, budget):
    """Where p_y is near 1, W[y] - E_p[W] is a small difference of large terms, if it is computed as one."""
    hidden, weight, targets, _ = problem(spread=1.0)
    hidden = hidden + 40 * weight[targets] / weight[targets].square().sum(1, keepdim=True)
    doubles = hidden.double(), weight.double(), targets, None
    truth, (want,) = evaluate(reference.linear_logprobs, *doubles, frozen=True)
    assert truth[0].max() > -1e-6
    _, (got, *_) = evaluate(
        linear_logprobs, hidden, weight, targets, None, frozen=budget == "frozen", memory_budget=BUDGETS[budget],
        backend="cpu",
    )  # fmt: skip
    relative = (got - want).norm(dim=1) / want.norm(dim=1)
    assert relative.max() <= 4 * logit_error(hidden, weight) + V * EPS


@pytest.mark.parametrize("budget", [0, 1 << 20, "frozen"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_in_float64(isa, budget, softcap):
    hidden, weight, targets, bias = (
        t.double() if t.is_floating_point() else t for t in problem(n=5, width=3, vocab=7, bias=True)
    )
    targets[2] = -100
    trainable = budget != "frozen"
    entropy = budget == 0
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trainable), bias.requires_grad_(trainable)]

    def run(h, w, b):
        return linear_logprobs(
            h, w, targets, bias=b, softcap=softcap, temperature=0.8, entropy=entropy, backend="cpu",
            memory_budget=budget if trainable else None,
        )  # fmt: skip

    torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
def test_threads_do_not_change_a_bit(isa, threads, dtype, budget):
    inputs = problem(dtype, n=230, vocab=5000, bias=True)
    results = []
    for count in (1, 2, 8):
        threads(count)
        values, grads = evaluate(
            linear_logprobs, *inputs, frozen=budget == "frozen", memory_budget=BUDGETS[budget], backend="cpu"
        )
        results.append(values + grads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("budget", ["recomputed", "kept"])
@pytest.mark.parametrize(("width", "vocab"), [(2048, 15 * 256 + 1), (8192, 2 * 256 + 1)])
def test_threads_do_not_change_a_bit_of_a_wide_heads_gradient(isa, threads, width, vocab, budget):
    """A weight's gradient sums over rows, block by block: the blocks may not shrink so that all workers' rows fit a
    budget. There is a worker for every 256 entries of such vocabularies, up to the number of threads.
    """
    inputs, results = problem(n=130, width=width, vocab=vocab, bias=True), []
    for count in (1, 2, 8, 16):
        threads(count)
        results.append(evaluate(linear_logprobs, *inputs, memory_budget=BUDGETS[budget], backend="cpu")[1])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("entropy", [False, True])
def test_the_batch_does_not_change_a_row_by_a_bit(isa, entropy):
    inputs = problem(n=230)
    for frozen in (True, False):
        hidden, weight, targets, _ = inputs

        def one(hidden, targets, frozen=frozen, weight=weight):
            hidden = hidden.clone().requires_grad_()
            out = linear_logprobs(
                hidden, weight.clone().requires_grad_(not frozen), targets, entropy=entropy, memory_budget=0,
                backend="cpu",
            )  # fmt: skip
            outs = out if entropy else (out,)
            return [*outs, *torch.autograd.grad(sum(o.sum() for o in outs), hidden)]

        whole = one(hidden, targets)
        for rows in ([0], [229], list(range(200, 90, -7))):
            part = one(hidden[rows], targets[rows])
            for a, b in zip(whole, part, strict=True):
                assert torch.equal(a[rows], b)


def test_many_rows(isa):
    rows = 100_000
    hidden, weight, targets, _ = problem(n=rows, width=8, vocab=50)
    targets[::3] = -100
    doubles = hidden.double(), weight.double(), targets, None
    truth, true_grads = evaluate(reference.linear_logprobs, *doubles)
    found, grads = evaluate(linear_logprobs, hidden, weight, targets, None, backend="cpu")
    error = logit_error(hidden, weight)
    assert (found[0] - truth[0]).abs().max() <= 2 * error
    for got, want in zip(grads, true_grads, strict=True):  # a weight row sums over all tokens
        assert (got - want).abs().max() <= (4 * error + rows * EPS) * want.abs().max()


@pytest.mark.parametrize("budget", ["kept", "recomputed"])
@pytest.mark.parametrize("width", [37, 64, 2112])
def test_three_blocks_of_rows_meet_the_tiles_of_a_chunk(isa, width, budget):
    """In bfloat16, where what is laid out is kept: rows for all chunks, a wide weight's only tile for all blocks."""
    inputs = problem(torch.bfloat16, n=410, width=width, vocab=3 * 256 + 1)
    truth, true_grads = evaluate(reference.linear_logprobs, inputs[0].double(), inputs[1].double(), *inputs[2:])
    found, grads = evaluate(linear_logprobs, *inputs, memory_budget=BUDGETS[budget], backend="cpu")
    error = logit_error(*inputs[:2])
    assert (found[0] - truth[0]).abs().max() <= 2 * error
    for got, want in zip(grads, true_grads, strict=True):
        budgeted = (4 * error + V * EPS + torch.finfo(torch.bfloat16).eps) * want.abs().max()
        assert (got.double() - want).abs().max() <= budgeted


@pytest.mark.parametrize(("n", "width", "vocab"), [(1, 1, 1), (1, 5, 3), (25, 1, 257), (2, 300, 255), (24, 48, 2048)])
def test_sizes_around_the_tiles(isa, n, width, vocab):
    inputs = problem(n=n, width=width, vocab=vocab)
    doubles = inputs[0].double(), inputs[1].double(), inputs[2], None
    for frozen in (True, False):
        truth, true_grads = evaluate(reference.linear_logprobs, *doubles, frozen=frozen)
        found, grads = evaluate(linear_logprobs, *inputs, frozen=frozen, backend="cpu")
        error = logit_error(*inputs[:2]) + 4 * EPS
        assert (found[0] - truth[0]).abs().max() <= 2 * error
        for got, want in zip(grads, true_grads, strict=True):
            assert (got - want).abs().max() <= (4 * error + vocab * EPS) * max(want.abs().max(), inputs[1].abs().max())


def test_every_layout_gives_the_same_bits(isa):
    hidden, weight, targets, _ = problem()
    want, want_grads = evaluate(linear_logprobs, hidden, weight, targets, None, backend="cpu")
    wide_hidden, wide_weight = torch.full((N, H + 5), 9.0), torch.full((V, 2 * H), 9.0)
    wide_hidden[:, 2 : H + 2], wide_weight[:, ::2] = hidden, weight
    strided = (
        (wide_hidden[:, 2 : H + 2], wide_weight[:, ::2], targets),
        (hidden.T.contiguous().T, weight.T.contiguous().T, targets.repeat_interleave(2)[::2]),
    )
    for h, w, y in strided:
        got = linear_logprobs(h, w, y, backend="cpu")
        assert torch.equal(got, want[0])
        leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
        weighted = linear_logprobs(*leaves, y, backend="cpu") * torch.linspace(-1, 1.7, N)
        got = torch.autograd.grad(weighted.sum(), leaves)
        for a, b in zip(got, want_grads, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", [True, False])
def test_ignored_rows_are_zero_and_touch_nothing(isa, frozen):
    hidden, weight, targets, _ = problem()
    kept = torch.arange(N) % 3 != 1
    targets[~kept] = -100
    hidden[~kept] = float("nan")
    (logprobs,), grads = evaluate(linear_logprobs, hidden, weight, targets, None, frozen=frozen, backend="cpu")
    assert (logprobs[~kept] == 0).all() and (logprobs[kept] != 0).all()
    assert (grads[0][~kept] == 0).all() or frozen  # 0 times a gradient that was never formed
    assert all(g.isfinite().all() for g in grads)


def test_no_scored_row_at_all(isa):
    hidden, weight, targets, bias = problem(bias=True)
    (logprobs,), grads = evaluate(linear_logprobs, hidden, weight, torch.full_like(targets, -100), bias, backend="cpu")
    assert (logprobs == 0).all()
    assert all((g == 0).all() for g in grads)


def test_vocabulary_entries_masked_by_an_infinite_bias(isa):
    hidden, weight, targets, bias = problem(bias=True)
    bias[:300] = -float("inf")  # a whole tile, and some
    targets = targets.clamp(min=300)
    for frozen in (True, False):
        found, grads = evaluate(
            linear_logprobs, hidden, weight, targets, bias, entropy=True, frozen=frozen, backend="cpu"
        )
        want, want_grads = evaluate(
            linear_logprobs, hidden, weight[300:], targets - 300, bias[300:], entropy=True, frozen=frozen, backend="cpu"
        )
        error = logit_error(hidden, weight) + V * EPS
        for got, expected in zip(found, want, strict=True):
            assert (got - expected).abs().max() <= 10 * error
        assert (grads[0] - want_grads[0]).abs().max() <= 40 * error * want_grads[0].abs().max()
        if not frozen:
            assert (grads[1][:300] == 0).all() and (grads[2][:300] == 0).all()


def test_every_16_bit_value_is_widened_exactly(isa):
    """One logit per float16 (bfloat16) value x, and its twin at 0: log p(x) - log p(0) = x."""
    for dtype, scale in ((torch.float16, 2.0**-10), (torch.bfloat16, 1.0)):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
        values = values[values.isfinite() & (values.abs() * scale < 64)].to(dtype)
        hidden, targets = torch.ones(values.numel(), 1, dtype=dtype), torch.zeros(values.numel(), dtype=torch.int64)
        for start in range(0, values.numel(), 8192):
            rows = slice(start, start + 8192)
            pair = torch.zeros(2, 1, dtype=dtype)
            pair[0] = 1
            got = linear_logprobs(
                values[rows, None] * hidden[rows], pair, targets[rows], logit_scale=scale, backend="cpu"
            )
            want = torch.nn.functional.logsigmoid(values[rows].double() * scale)
            assert (got - want).abs().max() <= 4 * EPS * 64


def test_only_scored_rows_are_kept(isa):
    hidden, weight, targets, _ = problem()
    targets[10:] = -100
    logprobs = linear_logprobs(hidden, weight.requires_grad_(), targets, backend="cpu")
    (head, _), *_ = logprobs.grad_fn.next_functions
    cache, shifts = head.saved_tensors[5:7]
    assert len(cache) == len(shifts) == cpu_head.cacheable_rows(10, hidden.dtype, 4 * V, 1 << 30) < N


@pytest.mark.parametrize("grads", [False, True])
def test_opcheck(isa, grads):
    hidden, weight, targets, bias = problem(bias=True)
    targets[3] = -100
    cache_rows = 0 if grads else cpu_head.cacheable_rows(N, torch.float32, V * 4, 1 << 30)
    args = (hidden, weight, targets, bias, 1.0, 5.0, 0.7, -100, grads, grads, cache_rows)
    torch.library.opcheck(torch.ops.fastalign.linear_logprobs, args, {"backend": "cpu"})
    if grads:
        return
    *_, stats, cache, shifts = torch.ops.fastalign.linear_logprobs(*args, backend="cpu")
    args = (torch.randn(N), None, hidden, weight, targets, bias, stats, cache, shifts, 1.0, 5.0, 0.7, -100, [True] * 3)
    torch.library.opcheck(torch.ops.fastalign.linear_logprobs_backward, args, {"backend": "cpu"})


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(frozen, compiler):
    inputs = problem(bias=True)

    def run(*args, **options):
        return linear_logprobs(*args, backend="cpu", **options)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    want, want_grads = evaluate(run, *inputs, frozen=frozen)
    got, got_grads = evaluate(compiled, *inputs, frozen=frozen)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        assert torch.equal(a, b)


# Of one forward and backward pass, in a process of its own, whose peak is not another test's.
MEMORY = """
import json, torch
from bench.harness.measure import peak_extra_memory
from fastalign import linear_logprobs
torch.set_num_threads(2)
N, H = 256, 32

def extra(vocab, trainable):
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(vocab, H, requires_grad=trainable)
    targets = torch.randint(vocab, (N,))
    run = lambda: linear_logprobs(hidden, weight, targets, memory_budget=0, backend="cpu").sum().backward()
    return peak_extra_memory(run) - trainable * vocab * H * 4  # the gradient is the result, not extra

extra(2000, True), extra(2000, False)  # what the first call alone loads
print(json.dumps({kind: [extra(v, kind == "trainable") for v in (8_000, 128_000)] for kind in ("frozen", "trainable")}))
"""


def test_extra_memory_does_not_grow_with_the_vocabulary():
    """The workspace is not torch's, so only the process's resident set sees it."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for at_8k, at_128k in json.loads(done.stdout).values():
        assert max(at_8k, at_128k) <= 256 * 32 * 4 + (32 << 20)
        assert at_128k - at_8k <= 2 << 20, "a huge page; logits of the larger vocabulary would be 125 MB"


def test_another_thread_runs_during_a_call(monkeypatch):
    """The GIL is released. Python would hand it over after its switch interval by itself, so that is out of reach."""
    ran_during = {}
    before = sys.getswitchinterval()

    def watched(name, call):
        go, ran = threading.Event(), []
        thread = threading.Thread(target=lambda: go.wait() and ran.append(name))
        thread.start()
        sys.setswitchinterval(100)
        try:
            go.set()
            result = call()
            ran_during[name] = bool(ran)
        finally:
            sys.setswitchinterval(before)
        thread.join()
        return result

    watched("Python", lambda: sum(range(3_000_000)))
    assert not ran_during.pop("Python"), "a call that keeps the GIL is told from one that does not"
    kernels = cpu.in_use.kernels

    class Watched:
        def __getattr__(self, name):
            found = getattr(kernels, name)
            return (lambda *arguments: watched(name, lambda: found(*arguments))) if callable(found) else found

    monkeypatch.setattr(cpu.in_use, "kernels", Watched())
    evaluate(linear_logprobs, *problem(n=256, width=256, vocab=20_000), memory_budget=0, backend="cpu")
    assert ran_during == {"forward": True, "backward": True}


def test_auto_takes_the_kernels_where_they_are_fast():
    hidden, weight, targets, _ = problem()
    for isa in ISAS:
        cpu.select(isa)
        backend = "torch" if isa == "plain" else "cpu"
        want = linear_logprobs(hidden, weight, targets, backend=backend)
        assert torch.equal(linear_logprobs(hidden, weight, targets), want)
    cpu.select(None)


def test_a_dtype_it_does_not_take_is_named():
    hidden, weight, targets, _ = problem()
    with pytest.raises(BackendError, match="meta"):
        linear_logprobs(hidden.to("meta"), weight.to("meta"), targets.to("meta"), backend="cpu")
    low = torch.float8_e4m3fn
    with pytest.raises(InputError, match="float8_e4m3fn"):
        linear_logprobs(hidden.to(low), weight.to(low), targets, backend="cpu")
