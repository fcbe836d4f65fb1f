"""The epilogue of csrc/cuda, run on the CPU, against fastalign/ops/head/epilogue.py in float64."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import BackendError
from fastalign.ops.head import epilogue
from fastalign.ops.head.epilogue import Coefficients, Sums
from fastalign.ops.head.tiling import START
from fastalign.ops.head.transform import LogitTransform

ROWS, WIDTH, FIRST = 6, 11, 64
EPS32 = torch.finfo(torch.float32).eps
BEFORE = torch.tensor([START, -9.0, 4.0, 30.0, -1.0, 7.0])  # the shift
HEADS = {"plain": LogitTransform(), "scaled": LogitTransform(0.5, None, 0.7), "capped": LogitTransform(1.3, 8.0, 0.7)}


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).double()


def rows_apart(*shape, dtype=torch.float32, padding=5):
    """A matrix of NaN whose rows lie `padding` values apart, so that most do not begin at a multiple of 16 bytes."""
    return torch.full((shape[0], shape[1] + padding), torch.nan, dtype=dtype)[:, : shape[1]]


def problem(columns, masked, padding=5):
    """A tile with targets in it, before it and behind it, and a bias, masked or not."""
    u = rows_apart(ROWS, columns, padding=padding).copy_(random(ROWS, columns, scale=3.0))
    targets = torch.tensor([FIRST, FIRST - 1, FIRST + columns, FIRST + columns - 1, 1 << 40, FIRST + 18])
    bias = random(columns, seed=3)
    if masked:
        bias[3::7] = -torch.inf
    return u, targets, bias


def within_budget(ours, plain, exact, eps):
    """|ours - exact| <= 2 (|plain - exact| + eps max|exact|), row by row."""
    ours, plain, exact = (t.double() for t in (ours, plain, exact))
    assert ours.isfinite().all()
    assert ((ours - exact).abs().amax(1) <= 2 * ((plain - exact).abs() + eps * exact.abs()).amax(1)).all()


def within_rounding(ours, exact, dtype, logit, size=0.0):
    """|ours - exact| <= (eps + 4 eps32 logit) (|exact| + size): three float32 operations make a logit of that size,
    one subtracts the shift, and a rounding of its exponent is a relative error of the exponential. `size` is that of
    what cancels in a sum. Below its smallest normal number a dtype's steps are of one size."""
    info = torch.finfo(dtype)
    ours, exact = (t.double().view(ROWS, -1) for t in (ours, exact))
    assert ours.isfinite().all()
    allowed = (info.eps + 4 * EPS32 * logit) * (exact.abs() + size) + info.eps * info.smallest_normal
    assert ((ours - exact).abs() <= allowed).all()


def begun(computed):
    """Sums of every kind, and a and b: at their start, far below what comes, a little below, and above."""
    fresh = BEFORE == START
    sums = Sums(BEFORE, random(ROWS, seed=1).exp(), -random(ROWS, seed=2).exp(), random(ROWS, seed=5))
    sums = Sums(BEFORE.to(computed, copy=True), *(t.masked_fill(fresh, 0).to(computed) for t in sums[1:]))
    return sums, *(random(ROWS, WIDTH, seed=seed).masked_fill(fresh.unsqueeze(1), 0).to(computed) for seed in (6, 7))


def absorbed(absorb, u, targets, bias, head, dtype, computed, keep_in_u):
    """One tile folded into the sums."""
    sums, a, b = begun(computed)
    best = sums.shift.clone(), torch.full((ROWS,), 3)
    u = u.to(computed) if computed == torch.float64 else u.clone() if not keep_in_u else u
    e = rows_apart(*u.shape, dtype=dtype)
    ze = u.view(dtype)[:, : u.shape[1]] if keep_in_u else rows_apart(*u.shape, dtype=dtype)
    absorb(u, targets, FIRST, bias.to(computed), head, sums, entropy=True, e=e, ze=ze, a=a, b=b, best=best)
    return sums, e, ze, a, b, best


def lag_of(shift, exact):
    """How far the shift stays behind the maximum; it moves only where it must."""
    lag = exact - shift
    assert ((lag >= -1e-5) & (lag <= 8)).all()
    stays = exact <= BEFORE + 8
    assert stays.any() and not stays.all() and torch.equal(shift[stays], BEFORE[stays])
    return lag.unsqueeze(1)


TILES = [(torch.float32, 1051, 5), (torch.bfloat16, 1048, 8), (torch.bfloat16, 300, 5), (torch.float16, 1051, 3)]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("dtype", "columns", "padding"), TILES, ids=str)
def test_absorb(cuda, dtype, columns, padding, head, masked):
    masked = masked and head != "capped"  # a cap lifts -inf
    u, targets, bias = problem(columns, masked, padding)
    head = HEADS[head]
    exact = absorbed(epilogue.absorb, u, targets, bias, head, torch.float64, torch.float64, False)
    sums, e, ze, a, b, best = absorbed(cuda.absorb, u, targets, bias, head, dtype, torch.float32, True)

    lag = lag_of(sums.shift, exact[0].shift)
    logit = 1 + exact[0].shift.abs().unsqueeze(1) + 15  # no logit lies further below the maximum than that
    pairs = ((sums.others, sums.zothers, torch.float32), (e, ze, dtype), (a, b, torch.float32))
    s, *matrices, exact_best = exact
    for (value, z_value, kind), exact_pair in zip(
        pairs, ((s.others, s.zothers), matrices[:2], matrices[2:]), strict=True
    ):
        # sums of exp(z - m) and of exp(z - m)(z - m), taken from their shift to ours
        true, z_true = (t.view(ROWS, -1) for t in exact_pair)
        within_rounding(value, lag.exp() * true, kind, logit)
        within_rounding(
            z_value, lag.exp() * (z_true + lag * true), kind, logit, size=(lag.exp() * true).abs() * (1 + lag)
        )
    within_rounding(sums.target, exact[0].target, torch.float32, 1)
    within_rounding(best[0], exact_best[0], torch.float32, 1)
    assert torch.equal(best[1], exact_best[1])
    for row in (0, 3, 5):
        column = targets[row] - FIRST
        assert e[row, column] == 0 and ze[row, column] == 0
    if masked:
        assert not e[:, 3::7].any() and not ze[:, 3::7].any()


@pytest.mark.parametrize("scale", [1.0, 0.7, -1.3])
@pytest.mark.parametrize(("dtype", "columns", "padding"), [*TILES, (torch.bfloat16, 16384, 8)], ids=str)
def test_absorb_without_cap_bias_entropy_and_best(cuda, dtype, columns, padding, scale):
    u, targets, _ = problem(columns, False, padding)
    u[0, targets[0] - FIRST] = 25  # by far the largest, and still the shift follows

    def absorbed(absorb, u, e, computed):
        sums, a, _ = begun(computed)
        absorb(u, targets, FIRST, None, LogitTransform(scale), sums, e=e, a=a)
        return sums, e, a

    exact, *matrices = absorbed(epilogue.absorb, u.double(), torch.empty(u.shape).double(), torch.float64)
    sums, e, a = absorbed(cuda.absorb, u, u.view(dtype)[:, :columns], torch.float32)
    lag = lag_of(sums.shift, exact.shift)
    logit = 1 + exact.shift.abs().unsqueeze(1) + 30  # no logit lies further below the maximum than that
    pairs = (sums.others, torch.float32), (e, dtype), (a, torch.float32)
    for (value, kind), true in zip(pairs, (exact.others, *matrices), strict=True):
        within_rounding(value, lag.exp() * true.view(ROWS, -1), kind, logit)
    within_rounding(sums.target, exact.target, torch.float32, 1)
    for row in (0, 3, 5):
        assert e[row, targets[row] - FIRST] == 0


@pytest.mark.parametrize("option", ["bias", "cap", "entropy", "ze", "best"])
def test_absorb_with_one_option(cuda, option):
    u, targets, bias = problem(300, False)
    head = HEADS["capped" if option == "cap" else "plain"]

    def absorbed(absorb, u, entropy):
        sums = Sums(torch.full((ROWS,), START, dtype=u.dtype), *torch.zeros(3, ROWS, dtype=u.dtype))
        ze, best = torch.zeros_like(u), (sums.shift.clone(), torch.zeros(ROWS, dtype=torch.int64))
        absorb(
            u, targets, FIRST, bias.to(u.dtype) if option == "bias" else None, head, sums, entropy=option in entropy,
            ze=ze if option == "ze" else None, best=best if option == "best" else None,
        )  # fmt: skip
        return sums.others, sums.target, sums.zothers if option == "entropy" else ze, *best

    exact = absorbed(epilogue.absorb, u.double(), ["entropy", "ze"])
    for ours, true in zip(absorbed(cuda.absorb, u, ["entropy"]), exact, strict=True):
        torch.testing.assert_close(ours, true.to(ours.dtype), rtol=1e-5, atol=1e-6)


def test_absorb_only_the_sums_and_leave_the_rest_alone(cuda):
    u, targets, _ = problem(1051, False)
    kept = u.clone()
    sums = Sums(torch.full((ROWS,), START), *torch.zeros(3, ROWS))
    cuda.absorb(u, targets, FIRST, None, LogitTransform(), sums)
    assert torch.equal(u, kept) and not sums.zothers.any()
    plain = Sums(torch.full((ROWS,), START), *torch.zeros(3, ROWS))
    epilogue.absorb(u, targets, FIRST, None, LogitTransform(), plain)
    torch.testing.assert_close(sums.others, plain.others, rtol=1e-6, atol=0)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_softmax_gradient(cuda, dtype, head, entropy, biased):
    u, targets, bias = problem(1051, head != "capped")
    bias = bias.float() if biased else None
    head = HEADS[head]
    exact_c = Coefficients(
        random(ROWS, seed=8) + 9, random(ROWS, seed=9), random(ROWS, seed=10), random(ROWS, seed=11),
        random(ROWS, seed=12),
    )  # fmt: skip
    if not entropy:
        exact_c = exact_c._replace(entropy_factor=None)
    c = Coefficients(*(None if t is None else t.float() for t in exact_c))
    exact, plain = torch.empty(ROWS, 1051, dtype=torch.float64), torch.empty(ROWS, 1051, dtype=dtype)
    wide = None if bias is None else bias.double()
    epilogue.softmax_gradient(u.double(), targets, FIRST, wide, head, Coefficients(*(
        None if t is None else t.double() for t in c)), exact)  # fmt: skip
    epilogue.softmax_gradient(u.clone(), targets, FIRST, bias, head, c, plain)
    du = u.view(dtype)[:, :1051]
    cuda.softmax_gradient(u, targets, FIRST, bias, head, c, du)
    within_budget(du, plain, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kept_gradient(cuda, dtype):
    _, targets, _ = problem(300, False)
    kept = rows_apart(ROWS, 300, dtype=dtype, padding=8).copy_(random(ROWS, 300).abs())
    scale, target = random(ROWS, seed=8).float(), random(ROWS, seed=9).float()
    exact, plain, du = torch.empty(ROWS, 300).double(), torch.empty(ROWS, 300), rows_apart(ROWS, 300, dtype=dtype)
    epilogue.kept_gradient(kept.double(), targets, FIRST, scale.double(), target.double(), exact)
    epilogue.kept_gradient(kept.float(), targets, FIRST, scale, target, plain)
    cuda.kept_gradient(kept, targets, FIRST, scale, target, du)
    within_budget(du, plain, exact, torch.finfo(dtype).eps)


def test_a_tile_too_wide_is_refused(cuda):
    u, targets, _ = problem(16385, False)
    sums = Sums(torch.full((ROWS,), START), *torch.zeros(3, ROWS))
    with pytest.raises(BackendError, match="absorb could not be launched on cpu: invalid argument"):
        cuda.absorb(u, targets, FIRST, None, LogitTransform(), sums)


@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("head", HEADS)
def test_finish(cuda, check_finish, head, entropy, gradients):
    check_finish(cuda.finish, HEADS[head], entropy, gradients)
