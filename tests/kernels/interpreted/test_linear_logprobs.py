"""The epilogue in Triton against its definition in torch, in float64; then the whole op through the driver."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from fastalign import linear_logprobs
from fastalign.kernels import linear_logprobs as kernels
from fastalign.ops.backends import triton
from fastalign.ops.head import epilogue, tiling
from fastalign.ops.head.epilogue import Coefficients, Sums
from fastalign.ops.head.products import in_place
from fastalign.ops.head.tiling import START
from fastalign.ops.head.transform import LogitTransform

EPS = torch.finfo(torch.float32).eps
R, T, H = 5, 37, 11
HEADS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(logit_scale=-0.6, temperature=1.7),
    "softcap": LogitTransform(logit_scale=0.8, softcap=3.0, temperature=0.7),
}


def products(dtype=torch.float32, *, spread=3.0, seed=0, columns=T):
    generator = torch.Generator().manual_seed(seed)
    u = (torch.randn(R, columns, generator=generator, dtype=torch.float64) * spread).to(dtype)
    return u, torch.randn(columns, generator=generator, dtype=torch.float64).float()


def state(dtype=torch.float32, *, seed=1):
    """Sums as an earlier tile left them, for rows whose shift will stay, move, and start."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.rand(R, generator=generator, dtype=torch.float64).float().to(dtype) for _ in range(4)]
    shift = torch.tensor([START, -30.0, 4.0, 40.0, 2.0]).to(dtype)
    started = shift > START
    sums = Sums(shift, draw[0] * started, -draw[1] * started, draw[2] * started)
    a, b = (torch.randn(R, H, generator=generator).to(dtype) * started.unsqueeze(1) for _ in range(2))
    return sums, a, b


def at_shift(sums, a, b, e, ze, shift):
    """Everything `absorb` leaves, brought to one shift, in float64."""
    sums = Sums(*(t.double() for t in sums))
    moved = sums.shift - shift
    shrink = moved.exp()
    others, zothers = shrink * sums.others, shrink * (sums.zothers + moved * sums.others)
    column, down = moved.unsqueeze(1), shrink.unsqueeze(1)
    pairs = [(others, zothers)] + [(down * x, down * (y + column * x)) for x, y in ((a.double(), b.double()), (e, ze))]
    return [sums.target, *(t for pair in pairs for t in pair)]


@pytest.mark.parametrize(
    ("dtype", "out"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("head", HEADS)
def test_absorb(head, with_bias, dtype, out):
    head, (u, bias) = HEADS[head], products(dtype)
    bias = bias if with_bias else None
    targets, first = torch.tensor([100, 136, 120, 99, 137]), 100  # first, last, within, and just outside
    sums, a, b = state()
    exact_sums, exact_a, exact_b = state(torch.float64)
    exact_e, exact_ze = torch.empty(R, T, dtype=torch.float64), torch.empty(R, T, dtype=torch.float64)
    epilogue.absorb(
        u.double(), targets, first, None if bias is None else bias.double(), head, exact_sums, entropy=True,
        e=exact_e, ze=exact_ze, a=exact_a, b=exact_b,
    )  # fmt: skip
    before = Sums(*(t.clone() for t in sums)), a.clone(), b.clone()
    e, ze = torch.empty(R, T, dtype=out), torch.empty(R, T, dtype=out)
    kernels.absorb(u.clone(), targets, first, bias, head, sums, entropy=True, e=e, ze=ze, a=a, b=b)

    moved = sums.shift != before[0].shift
    assert moved.tolist() == [True, True, False, False, False]
    assert torch.equal(a[~moved], before[1][~moved]) and torch.equal(b[~moved], before[2][~moved])
    assert sums.target[3] == before[0].target[3] and sums.target[4] == before[0].target[4]
    got = at_shift(sums, a, b, e.double(), ze.double(), exact_sums.shift)
    want = at_shift(exact_sums, exact_a, exact_b, exact_e, exact_ze, exact_sums.shift)
    # A logit is off by some eps of its size, an exponential by that much in proportion, and (z - m) e by it once more.
    largest = u.double().abs().max() * abs(head.factor) + 40
    off = 4 * largest * EPS
    bounds = [off, *[off] * 4, off + torch.finfo(out).eps, off + 17 * torch.finfo(out).eps]
    for g, w, bound in zip(got, want, bounds, strict=True):
        assert (g - w).abs().max() <= bound * max(1.0, w.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absorb_in_place_reads_before_it_writes_and_stays_in_its_columns(dtype):
    (u, _), targets = products(columns=T + 3), torch.tensor([0, 1, 2, 3, 4])
    memory = u.clone()
    memory[:, T:] = 1e9  # what a mask too wide by one would fold in
    apart, beside = torch.empty(R, T, dtype=dtype), torch.empty(R, T)
    expected = Sums(*(torch.full((R,), value) for value in (START, 0.0, 0.0, 0.0)))
    kernels.absorb(u[:, :T].clone(), targets, 0, None, LogitTransform(), expected, entropy=True, e=beside, ze=apart)
    sums = Sums(*(torch.full((R,), value) for value in (START, 0.0, 0.0, 0.0)))
    tile = memory[:, :T]
    inside, e = in_place(tile, dtype), torch.empty(R, T)
    kernels.absorb(tile, targets, 0, None, LogitTransform(), sums, entropy=True, e=e, ze=inside)
    assert torch.equal(inside, apart) and torch.equal(e, beside) and all(map(torch.equal, sums, expected))
    assert (memory[:, T:] == 1e9).all()


def test_absorb_of_masked_entries_and_argmax():
    u, bias = products()
    bias[:] = -math.inf
    sums, *_ = state()
    before = Sums(*(t.clone() for t in sums))
    best = torch.full((R,), -math.inf), torch.full((R,), -1)
    e = torch.full((R, T), math.nan)
    kernels.absorb(u.clone(), torch.full((R,), 3), 0, bias, LogitTransform(), sums, entropy=True, e=e, best=best)
    assert not e.any() and all(map(torch.equal, sums[:3], before[:3])) and (sums.target == -math.inf).all()
    for seed, first in ((0, 50), (1, 50 + T)):
        u, _ = products(seed=seed)
        kernels.absorb(u, torch.full((R,), -1), first, None, LogitTransform(), sums, best=best)
    both = torch.cat([products(seed=0)[0], products(seed=1)[0]], 1)
    assert torch.equal(best[0], both.amax(1)) and torch.equal(best[1], both.argmax(1) + 50)


@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("head", HEADS)
def test_finish(head, entropy, gradients, check_finish):
    check_finish(triton.epilogue().finish, HEADS[head], entropy, gradients)


def coefficients(entropy):
    generator = torch.Generator().manual_seed(2)
    shift, mean, logprobs, g_entropy, target = torch.randn(5, R, generator=generator)
    return Coefficients(shift + 3, mean - 4, logprobs, g_entropy if entropy else None, target)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("head", HEADS)
def test_softmax_gradient(head, with_bias, entropy, out):
    head, (u, bias) = HEADS[head], products(spread=1.0)
    bias = bias if with_bias else None
    targets, first = torch.tensor([100, 136, 120, 99, 137]), 100
    c = coefficients(entropy)
    exact = torch.empty(R, T, dtype=torch.float64)
    epilogue.softmax_gradient(
        u.double(), targets, first, None if bias is None else bias.double(), head,
        Coefficients(*(None if t is None else t.double() for t in c)), exact,
    )  # fmt: skip
    du = in_place(u, out)
    kernels.softmax_gradient(u, targets, first, bias, head, c, du)
    largest = exact.abs().amax(1, keepdim=True)
    assert ((du.double() - exact).abs() <= (64 * EPS + torch.finfo(out).eps) * largest).all()
    torch.testing.assert_close(
        du[[0, 1, 2], [0, 36, 20]].float(), c.target[:3], rtol=torch.finfo(out).eps, atol=0.0
    )  # the interpreter cuts where hardware rounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_gradient(dtype):
    cache = products(dtype, columns=3 * T)[0]
    kept, targets = cache[:, T : 2 * T], torch.tensor([T, 2 * T - 1, T + 5, T - 1, 2 * T])
    before, c = cache.clone(), coefficients(False)
    memory = torch.full((R, T + 3), 1e9)
    du = in_place(memory[:, :T], dtype)
    kernels.kept_gradient(kept, targets, T, c.logprob_factor, c.target, du)
    exact = torch.empty(R, T, dtype=torch.float64)
    epilogue.kept_gradient(kept, targets, T, c.logprob_factor.double(), c.target.double(), exact)
    assert ((du.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()
    assert torch.equal(cache, before) and (memory[:, T:] == 1e9).all()


@pytest.mark.parametrize("target", [-1, -(2**40), T, 2**40, 2**62])
def test_targets_out_of_range_touch_nothing(target):
    targets, first = torch.full((R,), target), 0
    memory = torch.full((3, R), 7.0)
    sums = Sums(torch.full((R,), START), torch.zeros(R), torch.zeros(R), memory[1])
    u, bias = products()
    e = torch.empty(R, T)
    kernels.absorb(u.clone(), targets, first, bias, LogitTransform(), sums, e=e)
    assert (memory == 7).all()
    assert torch.allclose(sums.others, e.sum(1)) and (e > 0).all()
    c = coefficients(False)
    du = torch.empty(R, T)
    kernels.softmax_gradient(u, targets, first, bias, LogitTransform(), c, du)
    assert not (du == c.target.unsqueeze(1)).any()


# The whole op: the tests of backend "torch", with its budgets, on backend "triton".


def shared_tests():
    path = Path(__file__).parents[2] / "ops" / "test_linear_logprobs.py"
    spec = importlib.util.spec_from_file_location("torch_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.problem.__kwdefaults__["n"] = 21  # two blocks of rows
    module.fast = lambda *args, **options: linear_logprobs(*args, backend="triton", **options)
    return module


shared = shared_tests()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "logprobs_tile_shape", lambda device: (16, 32))


@pytest.mark.parametrize("budget", shared.BUDGETS)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize(("option", "dtype"), [("plain", torch.float32), ("all", torch.bfloat16)], ids=str)
def test_op_within_the_error_budget(option, dtype, entropy, budget):
    shared.test_error_budget(option, entropy, dtype, budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_with_and_without_gradients(dtype, monkeypatch):
    """Or the margins of preference training would not begin at exactly 0. The same rounding on a GPU asks for one and
    the same kernel besides: exponentials are stored whether anybody reads them or not."""
    hidden, weight, targets, _ = shared.problem(dtype, n=21, ignored=0.1)
    stored, absorb = [], kernels.absorb
    monkeypatch.setattr(
        kernels,
        "absorb",
        lambda *args, e=None, **options: stored.append(e is not None) or absorb(*args, e=e, **options),
    )
    plain = shared.fast(hidden, weight, targets)
    for options in ({"frozen": True}, {}, {"memory_budget": 0}):
        (logprobs,), _ = shared.evaluate(shared.fast, hidden, weight, targets, **options)
        assert torch.equal(plain, logprobs)
    assert stored and all(stored)


def test_op_with_several_blocks_of_rows():
    check = shared.check_against_float64
    check(shared.problem(n=21, ignored=0.1), frozen=False, memory_budget=16 * shared.ROW_BYTES)


def test_op_at_its_edges():
    shared.test_logits_up_to_60(True, torch.float32, "frozen")
    shared.test_masked_vocabulary_entries(None, False, "partly cached")
    shared.test_masked_vocabulary_entries(4.0, True, "frozen")
    shared.test_masked_target("recomputed")
    shared.test_confident_rows_keep_their_relative_accuracy(torch.bfloat16, "frozen")
    shared.test_confident_rows_keep_their_relative_accuracy(torch.float32, "partly cached")


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_while_a_graph_is_captured_ignored_rows_stay_and_count_nothing(trainable, monkeypatch):
    hidden, weight, targets, bias = shared.problem(n=21, ignored=0.3, bias=True)
    hidden[targets == -100] = math.nan
    bias[0] = 200.0
    options = {"frozen": not trainable, "memory_budget": 16 * shared.ROW_BYTES}
    expected = shared.evaluate(shared.fast, hidden, weight, targets, bias, **options)
    monkeypatch.setattr("fastalign.ops.head.rows.is_capturing", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # what would wait for the GPU
    outputs, grads = shared.evaluate(shared.fast, hidden, weight, targets, bias, **options)
    assert not outputs[0][targets == -100].any() and not grads[0][targets == -100].any()
    for got, want in zip(outputs + grads, expected[0] + expected[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_strided_inputs():
    hidden, weight, targets, bias = shared.problem(n=11, bias=True)
    expected = shared.evaluate(shared.fast, hidden, weight, targets, bias)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (hidden, weight, targets, bias)]
    assert not any(t.is_contiguous() for t in strided)
    got = shared.evaluate(shared.fast, *strided)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grads", [False, True], ids=["", "gradients"])
def test_opcheck(grads):
    """With a whole block of rows, which nothing is cut off from: results are tensors of their own none the less."""
    hidden, weight, targets, bias = shared.problem(n=16, bias=True)
    args = (hidden, weight, targets, bias, 1.3, 5.0, 0.7, -100, grads, True, 0)
    torch.library.opcheck(torch.ops.fastalign.linear_logprobs.default, args, {"backend": "triton"})


@pytest.mark.parametrize("n", [16, 32], ids=["a block", "two"])
def test_logprobs_may_be_changed_in_place(n):
    hidden, weight, targets, _ = shared.problem(n=n)
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    (-shared.fast(leaves[0], weight, targets)).sum().backward()
    shared.fast(leaves[1], weight, targets).neg_().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_a_transposed_weight_is_read_as_it_is_and_only_copied_for_gradients(monkeypatch):
    hidden, weight, targets, _ = shared.problem(n=21)
    expected = shared.evaluate(shared.fast, hidden, weight, targets)
    transposed, picked, pick_rows = weight.T.contiguous().T, [], triton.pick_rows
    assert transposed.stride(1) != 1
    monkeypatch.setattr(triton, "pick_rows", lambda *args: picked.append(args) or pick_rows(*args))
    torch.testing.assert_close(shared.fast(hidden, transposed, targets), expected[0][0], rtol=1e-5, atol=1e-5)
    assert not picked
    for frozen in (True, False):
        got = shared.evaluate(shared.fast, hidden, transposed, targets, frozen=frozen)
        torch.testing.assert_close(got, (expected[0], expected[1][: len(got[1])]), rtol=1e-5, atol=1e-5)
    assert picked


def test_what_the_kernels_cannot_take_is_said():
    assert triton.why_not(torch.zeros(1), None, torch.zeros(1, dtype=torch.int64)) is None
    assert "meta" in triton.why_not(torch.zeros(1, device="meta"))
    assert "float64" in triton.why_not(torch.zeros(1, dtype=torch.float64))
