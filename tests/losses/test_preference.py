"""Losses of the margin against numbers worked out by hand from their papers, 60-digit arithmetic, and each other."""

from __future__ import annotations

from functools import partial
from math import log

import mpmath
import pytest
import torch

from fastalign.errors import InputError
from fastalign.losses.preference import discopop, dpo, exo, hinge, implicit_rewards, ipo, ipo_tau, robust

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
    # w = s(2 ln 6) = 36/37, exp(-ln 6) = 1/6.
    "discopop": (discopop, HALF | {"discopop_tau": 0.5}, 1 / 37 * log(7 / 6) + 36 / 37 / 6),
}
TOLERANCE = 32 * torch.finfo(torch.float64).eps * 12  # 32 roundings of inputs up to 12


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    loss, options, expected = BY_HAND[case]
    values = loss(column(-10 + U), column(-12 + V), column(-10), column(-12), **options)
    assert values.tolist() == pytest.approx([expected], abs=TOLERANCE)


# The papers' formulas in exact arithmetic, as functions of the log-ratios u and v.
def sigma(x):
    return 1 / (1 + mpmath.exp(-x))


def nll(x):
    return -mpmath.log(sigma(x)) if x > 0 else mpmath.log1p(mpmath.exp(-x))


def exact_exo(x, e):
    return sigma(x) * (-nll(x) - mpmath.log(1 - mpmath.mpf(e))) + sigma(-x) * (-nll(-x) - mpmath.log(e))


def exact_discopop(x, tau):
    return sigma(-x / tau) * nll(x) + sigma(x / tau) * mpmath.exp(-x)


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
    (discopop, {}),
    (discopop, {"discopop_tau": 1.0}),
]


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(("loss", "options"), ACCURACY_CASES)
def test_float32_is_accurate_at_any_margin(loss, options, beta, assert_accurate, points):
    def on_ratios(u, v):
        return loss(u, v, torch.zeros_like(u), torch.zeros_like(v), beta=beta, **options)

    terms = EXACT[loss] if isinstance(EXACT[loss], tuple) else (EXACT[loss],)
    assert_accurate(on_ratios, [partial(term, b=mpmath.mpf(beta), **options) for term in terms], points)


def test_dpo_without_smoothing_is_the_logistic_loss(make_logprobs):
    inputs = make_logprobs(4)
    margin = (inputs[0] - inputs[2]) - (inputs[1] - inputs[3])
    assert torch.equal(dpo(*inputs), -torch.nn.functional.logsigmoid(0.1 * margin))


def test_robust_without_flips_is_dpo_and_averages_to_it_over_flipped_labels(make_logprobs):
    chosen, rejected, ref_chosen, ref_rejected = inputs = make_logprobs(4)
    assert torch.equal(robust(*inputs), dpo(*inputs))
    kept = robust(*inputs, label_smoothing=0.3)
    flipped = robust(rejected, chosen, ref_rejected, ref_chosen, label_smoothing=0.3)
    torch.testing.assert_close(0.7 * kept + 0.3 * flipped, dpo(*inputs), rtol=1e-14, atol=1e-14)


def test_exo_is_zero_where_the_policy_matches_the_smoothed_label():
    zero = column(0.0)
    matched = exo(column(log(0.9 / 0.1)), zero, zero, zero, beta=1.0, label_smoothing=0.1)
    assert matched.item() == pytest.approx(0.0, abs=TOLERANCE)


def test_ipo_tau_at_one_half_is_ipo_times_beta_squared(make_logprobs):
    inputs = make_logprobs(4)
    torch.testing.assert_close(ipo_tau(*inputs, beta=0.2), 0.2**2 * ipo(*inputs, beta=0.2), rtol=1e-14, atol=1e-14)


def test_implicit_rewards_are_detached_log_ratios():
    policy = column(-3.0, -5.0).requires_grad_()
    rewards = implicit_rewards(policy, column(-4.0, -3.0), beta=0.5)
    assert rewards.tolist() == [0.5, -1.0] and not rewards.requires_grad


@pytest.mark.parametrize(
    ("loss", "options", "sentence"),
    [
        (exo, {"label_smoothing": 0.0}, "label_smoothing is 0 .* infinite .* 1e-3"),
        (ipo_tau, {"tau": float("inf")}, "tau is inf; expected a finite number"),
        (discopop, {"discopop_tau": 1.5}, r"discopop_tau is 1\.5; .* \(0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused(loss, options, sentence):
    with pytest.raises(InputError, match=sentence):
        loss(*[torch.zeros(3)] * 4, **options)
