"""Losses over pairs against numbers worked out by hand from their papers, 60-digit arithmetic, and each other."""

from __future__ import annotations

from functools import partial
from math import exp, log

import mpmath
import pytest
import torch

from fastalign.errors import InputError
from fastalign.losses import PAIRWISE, REFERENCE_FREE, implicit_rewards, log1mexp
from fastalign.losses.preference import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    cpo,
    discopop,
    dpo,
    exo,
    hinge,
    ipo,
    ipo_tau,
    nca,
    orpo,
    robust,
    simpo,
    sppo,
)

# With beta = 1/2: beta u = ln 3, so s(beta u) = 3/4; beta v = -ln 2, so s(beta v) = 1/3; beta m = ln 6, s = 6/7.
U, V = 2 * log(3), -2 * log(2)
HALF = {"beta": 0.5}
BY_HAND = {
    "dpo": (dpo, HALF, log(7 / 6)),
    "dpo, smoothed": (dpo, HALF | {"label_smoothing": 0.1}, 0.9 * log(7 / 6) + 0.1 * log(7)),
    "ipo": (ipo, HALF, (2 * log(6) - 1) ** 2),
    "ipo_tau": (ipo_tau, HALF | {"tau": 0.25}, (log(6) - 0.25) ** 2),
    "hinge, margin met": (hinge, HALF, 0.0),
    "hinge, margin not met": (hinge, {"beta": 0.25}, 1 - log(6) / 2),
    "robust": (robust, HALF | {"label_smoothing": 0.2}, (0.8 * log(7 / 6) - 0.2 * log(7)) / 0.6),
    # q = 6/7 against p = 7/8: q ln(q/p) = 6/7 ln(48/49), and 1/7 against 1/8.
    "exo": (exo, HALF | {"label_smoothing": 0.125}, 6 / 7 * log(48 / 49) + 1 / 7 * log(8 / 7)),
    "nca": (nca, HALF, log(4 / 3) + 0.5 * log(4) + 0.5 * log(3 / 2)),
    "bco_pair": (bco_pair, HALF, log(4 / 3) + log(3 / 2)),
    # s(ln 3 - ln 3) = 1/2 and s(ln 3 + ln 2) = 6/7.
    "bco_pair, shifted": (bco_pair, HALF | {"delta": log(3)}, log(2) + log(7 / 6)),
    "sppo": (sppo, HALF, (2 * log(3) - 1) ** 2 + (1 - 2 * log(2)) ** 2),
    "apo_zero": (apo_zero, HALF, 1 / 4 + 1 / 3),
    "apo_down": (apo_down, HALF, 3 / 4 + 1 / 7),
    # w = s(2 ln 6) = 36/37, exp(-ln 6) = 1/6.
    "discopop": (discopop, HALF | {"discopop_tau": 0.5}, 1 / 37 * log(7 / 6) + 36 / 37 / 6),
    "aot": (aot, HALF, log(7 / 6)),
    "aot_unpaired": (aot_unpaired, HALF, log(7 / 6)),
}
# x = 2 ((1/2 + ln 2 / 2) - 1/2) = ln 2 for simpo; x = 1/2 (2 ln 3) for cpo; odds 3 and 1/2 for orpo.
BY_HAND_REFERENCE_FREE = {
    "simpo": (simpo, (-1.0, -1.5 - log(2) / 2), {"beta": 2.0, "gamma_beta_ratio": 0.5}, log(3 / 2)),
    "cpo": (cpo, (-4.0, -4.0 - 2 * log(3)), HALF, log(4 / 3)),
    "cpo, smoothed": (cpo, (-4.0, -4.0 - 2 * log(3)), HALF | {"label_smoothing": 0.1}, 0.9 * log(4 / 3) + 0.1 * log(4)),
    "orpo": (orpo, (log(3 / 4), log(1 / 3)), HALF, 0.5 * log(7 / 6)),
}
TOLERANCE = 32 * torch.finfo(torch.float64).eps * 12  # 32 roundings of inputs up to 12


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    loss, options, expected = BY_HAND[case]
    values = loss(column(-10 + U), column(-12 + V), column(-10), column(-12), **options)
    assert values.tolist() == pytest.approx([expected], abs=TOLERANCE)


@pytest.mark.parametrize("case", BY_HAND_REFERENCE_FREE)
def test_by_hand_reference_free(case):
    loss, (chosen, rejected), options, expected = BY_HAND_REFERENCE_FREE[case]
    assert loss(column(chosen), column(rejected), **options).tolist() == pytest.approx([expected], abs=TOLERANCE)


# The papers' formulas in exact arithmetic, as functions of the log-ratios u and v; apo_down's two terms, whose slopes
# can cancel, one by one.
def sigma(x):
    return 1 / (1 + mpmath.exp(-x))


def nll(x):
    return -mpmath.log(sigma(x)) if x > 0 else mpmath.log1p(mpmath.exp(-x))


def exact_exo(x, e):
    return sigma(x) * (-nll(x) - mpmath.log(1 - mpmath.mpf(e))) + sigma(-x) * (-nll(-x) - mpmath.log(e))


def exact_discopop(x, tau):
    return sigma(-x / tau) * nll(x) + sigma(x / tau) * mpmath.exp(-x)


def exact_log_odds(a):
    return a - mpmath.log(-mpmath.expm1(a))


EXACT = {
    dpo: lambda u, v, b, label_smoothing=0: (
        (1 - label_smoothing) * nll(b * (u - v)) + label_smoothing * nll(b * (v - u))
    ),
    ipo: lambda u, v, b: (u - v - 1 / (2 * b)) ** 2,
    ipo_tau: lambda u, v, b, tau=0.5: (b * (u - v) - tau) ** 2,
    hinge: lambda u, v, b: max(mpmath.mpf(0), 1 - b * (u - v)),
    robust: lambda u, v, b, label_smoothing: (
        ((1 - label_smoothing) * nll(b * (u - v)) - label_smoothing * nll(b * (v - u)))
        / (1 - 2 * mpmath.mpf(label_smoothing))
    ),
    exo: lambda u, v, b, label_smoothing=1e-3: exact_exo(b * (u - v), label_smoothing),
    nca: lambda u, v, b: nll(b * u) + nll(-b * u) / 2 + nll(-b * v) / 2,
    bco_pair: lambda u, v, b, delta=0: nll(b * u - delta) + nll(delta - b * v),
    sppo: lambda u, v, b: (u - 1 / (2 * b)) ** 2 + (v + 1 / (2 * b)) ** 2,
    apo_zero: lambda u, v, b: sigma(-b * u) + sigma(b * v),
    apo_down: (lambda u, v, b: sigma(b * u), lambda u, v, b: sigma(b * (v - u))),
    discopop: lambda u, v, b, discopop_tau=0.05: exact_discopop(b * (u - v), mpmath.mpf(discopop_tau)),
}
ACCURACY_CASES = [
    (dpo, {}),
    (dpo, {"label_smoothing": 0.1}),
    (ipo, {}),
    (ipo_tau, {"tau": 0.3}),
    (hinge, {}),
    (robust, {"label_smoothing": 0.1}),
    (robust, {"label_smoothing": 0.49}),
    (exo, {}),
    (exo, {"label_smoothing": 0.2}),
    (nca, {}),
    (bco_pair, {"delta": 0.7}),
    (sppo, {}),
    (apo_zero, {}),
    (apo_down, {}),
    (discopop, {}),
    (discopop, {"discopop_tau": 1.0}),
]
POINTS = [
    *((margin, 0.0) for margin in (0.0, 1e-4, -0.3, 3.0, -3.0, 25.0, -25.0, 90.0, -90.0, 700.0, -700.0, 1e4, -1e4)),
    *((-20.0, margin - 20.0) for margin in (0.0, 0.3, -18.0, 25.0, 200.0, -1e4, 1e4)),
    *((1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4)),
]


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(("loss", "options"), ACCURACY_CASES)
def test_float32_is_accurate_at_any_margin(loss, options, beta, assert_accurate):
    def on_ratios(u, v):
        return loss(u, v, torch.zeros_like(u), torch.zeros_like(v), beta=beta, **options)

    terms = EXACT[loss] if isinstance(EXACT[loss], tuple) else (EXACT[loss],)
    assert_accurate(on_ratios, [partial(term, b=mpmath.mpf(beta), **options) for term in terms], POINTS)


def test_cpo_and_simpo_float32_is_accurate_at_any_margin(assert_accurate):
    exact = EXACT[dpo]
    assert_accurate(partial(cpo, label_smoothing=0.1), [lambda c, r: exact(c, r, mpmath.mpf(0.1), 0.1)], POINTS)
    assert_accurate(partial(simpo, beta=2.0), [lambda c, r: nll(2 * (c - r - mpmath.mpf(0.5)))], POINTS)


def test_orpo_float32_is_accurate_up_to_probability_one(assert_accurate):
    # -1e-7 is the last step of float32 below an average of sums near -1.
    averages = (-1e-7, -1e-3, -0.69, -0.7, -2.0, -30.0, -1e3, -1e4)
    points = [(a, b) for a in averages for b in averages]
    assert_accurate(orpo, [lambda c, r: mpmath.mpf(0.1) * nll(exact_log_odds(c) - exact_log_odds(r))], points)


def test_orpo_is_finite_where_an_average_has_rounded_to_probability_one():
    chosen = torch.tensor([0.0, -1.0, 0.0, 1e-6], requires_grad=True)
    rejected = torch.tensor([-1.0, 0.0, 0.0, 0.0], requires_grad=True)
    values = orpo(chosen, rejected)
    grads = torch.autograd.grad(values.sum(), (chosen, rejected))
    assert torch.isfinite(torch.stack((values, *grads))).all()
    assert values[0] < 1e-12 and values[1] > 8.0  # ln of the odds of the largest average below 0 is 87
    assert values[2].item() == values[3].item() == pytest.approx(0.1 * log(2), rel=1e-6)


def test_log1mexp_is_accurate_on_both_sides_of_its_branch():
    x = torch.tensor([-1e-30, -1e-6, -0.693, -0.694, -5.0, -50.0, -1e4], requires_grad=True)
    values = log1mexp(x)
    (slopes,) = torch.autograd.grad(values.sum(), x)
    eps = torch.finfo(torch.float32).eps
    with mpmath.workdps(60):
        for at, value, slope in zip(x.tolist(), values.tolist(), slopes.tolist(), strict=True):
            exact_slope = -1 / mpmath.expm1(-mpmath.mpf(at))
            # Four roundings of the value; an error eps of x moves the value by |x * slope| eps.
            exact_value = mpmath.log(-mpmath.expm1(mpmath.mpf(at)))
            assert abs(value - exact_value) <= 4 * eps * (abs(exact_value) + abs(at * exact_slope)) + 1e-38
            assert abs(slope - exact_slope) <= 4 * eps * abs(exact_slope) * (1 + abs(at)) + 1e-38
    assert log1mexp(torch.zeros(1)).item() == -torch.inf


def logprobs(name: str, batch: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = 2 if name in REFERENCE_FREE else 4
    return [
        (-4 * torch.rand(batch, dtype=torch.float64, generator=generator) - 0.01).requires_grad_() for _ in range(count)
    ]


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_are_those_of_the_values(name):
    assert torch.autograd.gradcheck(PAIRWISE[name], logprobs(name, batch=3), check_undefined_grad=False)


@pytest.mark.parametrize("name", sorted(PAIRWISE.keys() - REFERENCE_FREE - {"aot", "aot_unpaired"}))
def test_gradients_where_the_policy_is_the_reference(name):
    chosen, rejected, _, _ = logprobs(name, batch=3)
    references = chosen.detach().clone().requires_grad_(), rejected.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(PAIRWISE[name], (chosen, rejected, *references), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRWISE)
def test_values_and_gradients_are_finite_at_large_margins_in_the_dtype_given(name, dtype):
    chosen, rejected = torch.tensor(
        [(a, b) for a in (-1e4, -3.0, 0.0) for b in (-1e4, -3.0, 0.0)], dtype=dtype
    ).T.contiguous()
    inputs = [chosen.requires_grad_(), rejected.requires_grad_()]
    if name not in REFERENCE_FREE:
        inputs += [chosen.detach().flip(0), rejected.detach().roll(1)]
    values = PAIRWISE[name](*inputs)
    grads = torch.autograd.grad(values.sum(), inputs[:2])
    assert values.shape == (9,) and values.dtype == dtype
    assert torch.isfinite(torch.stack((values, *grads))).all()


@pytest.mark.parametrize("name", PAIRWISE)
def test_no_loss_looks_at_tensor_values(name):
    values = PAIRWISE[name](*(tensor.detach().to("meta") for tensor in logprobs(name)))
    assert values.shape == (6,)


def test_dpo_without_smoothing_is_the_logistic_loss():
    inputs = logprobs("dpo")
    margin = (inputs[0] - inputs[2]) - (inputs[1] - inputs[3])
    assert torch.equal(dpo(*inputs), -torch.nn.functional.logsigmoid(0.1 * margin))


def test_robust_without_flips_is_dpo_and_averages_to_it_over_flipped_labels():
    chosen, rejected, ref_chosen, ref_rejected = inputs = logprobs("robust")
    assert torch.equal(robust(*inputs), dpo(*inputs))
    kept = robust(*inputs, label_smoothing=0.3)
    flipped = robust(rejected, chosen, ref_rejected, ref_chosen, label_smoothing=0.3)
    torch.testing.assert_close(0.7 * kept + 0.3 * flipped, dpo(*inputs), rtol=1e-14, atol=1e-14)


def test_exo_is_zero_where_the_policy_matches_the_smoothed_label():
    zero = column(0.0)
    matched = exo(column(log(0.9 / 0.1)), zero, zero, zero, beta=1.0, label_smoothing=0.1)
    assert matched.item() == pytest.approx(0.0, abs=TOLERANCE)


def test_ipo_tau_at_one_half_is_ipo_times_beta_squared():
    inputs = logprobs("ipo")
    torch.testing.assert_close(ipo_tau(*inputs, beta=0.2), 0.2**2 * ipo(*inputs, beta=0.2), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_aot_of_one_pair_is_dpo(loss):
    inputs = logprobs("aot", batch=1)
    options = {"beta": 0.3, "label_smoothing": 0.1}
    torch.testing.assert_close(loss(*inputs, **options), dpo(*inputs, **options), rtol=1e-14, atol=1e-14)


def test_aot_compares_quantiles():
    # Margins 1, 3 and reference margins 2, 0: sorted differences 1 - 0 and 3 - 2, so d = 1 twice.
    values = aot(column(-1.0, -2.0), column(-2.0, -5.0), column(-1.0, -4.0), column(-3.0, -4.0), beta=1.0)
    assert values.tolist() == pytest.approx([log(1 + exp(-1))] * 2, abs=TOLERANCE)
    # u = 4, 1 and v = -1, 3: sorted differences 1 + 1 and 4 - 3.
    zero = column(0.0, 0.0)
    values = aot_unpaired(column(4.0, 1.0), column(-1.0, 3.0), zero, zero, beta=1.0)
    assert values.tolist() == pytest.approx([log(1 + exp(-2)), log(1 + exp(-1))], abs=TOLERANCE)


def test_aot_ignores_the_order_of_policy_against_reference_margins():
    chosen, rejected, ref_chosen, ref_rejected = logprobs("aot")
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    expected = aot(chosen, rejected, ref_chosen, ref_rejected)
    assert torch.equal(aot(chosen, rejected, ref_chosen[order], ref_rejected[order]), expected)
    assert torch.equal(aot(chosen[order], rejected[order], ref_chosen, ref_rejected), expected)
    assert not torch.equal(aot(chosen[order], rejected, ref_chosen, ref_rejected), expected)


def test_aot_unpaired_ignores_the_order_of_chosen_against_rejected():
    chosen, rejected, ref_chosen, ref_rejected = logprobs("aot_unpaired")
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    expected = aot_unpaired(chosen, rejected, ref_chosen, ref_rejected)
    assert torch.equal(aot_unpaired(chosen, rejected[order], ref_chosen, ref_rejected[order]), expected)
    assert not torch.equal(aot_unpaired(chosen, rejected[order], ref_chosen, ref_rejected), expected)


def test_implicit_rewards_are_detached_log_ratios():
    policy = column(-3.0, -5.0).requires_grad_()
    rewards = implicit_rewards(policy, column(-4.0, -3.0), beta=0.5)
    assert rewards.tolist() == [0.5, -1.0] and not rewards.requires_grad


def test_smoothing_moves_the_minimum_of_simpo_to_its_log_odds():
    # The slope vanishes where s(x) = 1 - e: x = ln 4 at e = 0.2, chosen - rejected = ln 4 / 2 + 1/2.
    chosen = column(log(4) / 2 + 0.5).requires_grad_()
    (slope,) = torch.autograd.grad(simpo(chosen, column(0.0), beta=2.0, label_smoothing=0.2).sum(), chosen)
    assert slope.item() == pytest.approx(0.0, abs=TOLERANCE)


BAD_CALLS = [
    (dpo, (torch.zeros(3), torch.zeros(2)), {}, r"rejected is a \(2,\) float32 tensor on cpu but chosen is a \(3,\)"),
    (dpo, (torch.zeros(3), torch.zeros(3).double()), {}, r"rejected is a \(3,\) float64 .* expected the same shape"),
    (dpo, (torch.zeros(3, 1), torch.zeros(3, 1)), {}, r"chosen is a \(3, 1\) .* one log-probability per sequence"),
    (ipo, (torch.zeros(3).bfloat16(), torch.zeros(3)), {}, "chosen is a .* bfloat16 .* sum the token log-prob"),
    (ipo, (-1.0, torch.zeros(3)), {}, "chosen is a float; expected one log-probability per sequence"),
    (hinge, (torch.zeros(3), torch.zeros(3)), {"beta": 0.0}, r"beta is 0\.0; expected a finite number above 0"),
    (nca, (torch.zeros(3), torch.zeros(3)), {"beta": float("nan")}, "beta is nan; expected a finite number above 0"),
    (aot, (torch.zeros(3), torch.zeros(3)), {"label_smoothing": 0.5}, r"label_smoothing is 0\.5; .* swap chosen"),
    (robust, (torch.zeros(3), torch.zeros(3)), {"label_smoothing": -0.1}, r"label_smoothing is -0\.1"),
    (exo, (torch.zeros(3), torch.zeros(3)), {"label_smoothing": 0.0}, "label_smoothing is 0 .* infinite .* 1e-3"),
    (ipo_tau, (torch.zeros(3), torch.zeros(3)), {"tau": float("inf")}, "tau is inf; expected a finite number"),
    (discopop, (torch.zeros(3), torch.zeros(3)), {"discopop_tau": 1.5}, r"discopop_tau is 1\.5; .* \(0, 1\]"),
    (simpo, (torch.zeros(3), torch.zeros(3)), {"gamma_beta_ratio": float("nan")}, "gamma_beta_ratio is nan"),
]


@pytest.mark.parametrize(("loss", "pair", "options", "sentence"), BAD_CALLS)
def test_bad_input_is_refused_in_one_sentence(loss, pair, options, sentence):
    references = () if loss is simpo else (torch.zeros(3), torch.zeros(3))
    with pytest.raises(InputError, match=sentence):
        loss(*pair, *references, **options)


@pytest.mark.parametrize("name", PAIRWISE)
def test_every_loss_validates(name):
    inputs = [tensor.detach() for tensor in logprobs(name)]
    with pytest.raises(InputError, match="expected the same shape"):
        PAIRWISE[name](*inputs[:-1], inputs[-1][:5])
    with pytest.raises(InputError, match="beta is -1"):
        PAIRWISE[name](*inputs, beta=-1)
