"""Losses over labelled single completions against numbers worked out by hand and 60-digit arithmetic."""

from __future__ import annotations

from math import log

import mpmath
import pytest
import torch

from fastalign.errors import InputError
from fastalign.losses import UNPAIRED, bco, kto, kto_baseline
from fastalign.losses.pointwise import apo_zero, bco_pair

# With beta = 1/2 and log-ratios 2 ln 3 (desirable) and -2 ln 2 (not): rewards ln 3 and -ln 2.
LOGPROBS = torch.tensor([-10 + 2 * log(3), -12 - 2 * log(2)], dtype=torch.float64)
REFERENCE = torch.tensor([-10.0, -12.0], dtype=torch.float64)
LABELS = torch.tensor([True, False])
TOLERANCE = 32 * torch.finfo(torch.float64).eps * 12


def test_kto_by_hand():
    # At z0 = 2 ln 2: s(ln 3 - ln 2) = 3/5, and s(ln 2 + ln 2) = 4/5.
    values = kto(LOGPROBS, REFERENCE, LABELS, 2 * log(2), beta=0.5, weights=(3.0, 2.0))
    assert values.tolist() == pytest.approx([3 * 2 / 5, 2 * 1 / 5], abs=TOLERANCE)


def test_bco_by_hand():
    # At delta = ln 2: s(ln 3 - ln 2) = 3/5, and s(ln 2 + ln 2) = 4/5.
    values = bco(LOGPROBS, REFERENCE, LABELS, log(2), beta=0.5)
    assert values.tolist() == pytest.approx([log(5 / 3), log(5 / 4)], abs=TOLERANCE)


def test_kto_baseline_is_the_detached_mean_log_ratio_and_never_negative():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    baseline = kto_baseline(policy, torch.tensor([-4.0, -3.0]))
    assert baseline.item() == 2.0 and not baseline.requires_grad
    assert kto_baseline(torch.tensor([-4.0]), torch.tensor([-3.0])).item() == 0.0


def test_at_baseline_zero_the_two_halves_make_the_paired_losses():
    halves = [(kto, apo_zero), (bco, bco_pair)]
    for unpaired, paired in halves:
        expected = paired(LOGPROBS[:1], LOGPROBS[1:], REFERENCE[:1], REFERENCE[1:], beta=0.3)
        torch.testing.assert_close(unpaired(LOGPROBS, REFERENCE, LABELS, 0.0, beta=0.3).sum(0, True), expected)


def sigma(x):
    return 1 / (1 + mpmath.exp(-x))


BASELINE = 0.75
RATIOS = (0.0, 1e-3, -3.0, 25.0, -25.0, 180.0, -180.0, 700.0, -700.0, 1e4, -1e4)
EXACT = {
    ("kto", True): lambda u: sigma(mpmath.mpf(0.1) * (BASELINE - u)),
    ("kto", False): lambda u: sigma(mpmath.mpf(0.1) * (u - BASELINE)),
    ("apo_zero_unpaired", True): lambda u: sigma(mpmath.mpf(0.1) * (BASELINE - u)),
    ("bco", True): lambda u: mpmath.log1p(mpmath.exp(BASELINE - mpmath.mpf(0.1) * u)),
    ("bco", False): lambda u: mpmath.log1p(mpmath.exp(mpmath.mpf(0.1) * u - BASELINE)),
}


@pytest.mark.parametrize(("name", "label"), EXACT)
def test_float32_is_accurate_at_any_log_ratio(name, label, assert_accurate):
    def loss(policy, reference):
        return UNPAIRED[name](policy, reference, torch.full(policy.shape, label), BASELINE)

    points = [(ratio, 0.0) for ratio in RATIOS] + [(-20.0, -20.0 - ratio) for ratio in RATIOS]
    assert_accurate(loss, [lambda policy, reference: EXACT[name, label](policy - reference)], points)


@pytest.mark.parametrize("name", UNPAIRED)
def test_gradients_are_those_of_the_values(name):
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-5 * torch.rand(2, 6, dtype=torch.float64, generator=generator)).requires_grad_().unbind()
    labels = torch.tensor([True, False, True, True, False, False])
    assert torch.autograd.gradcheck(lambda p, r: UNPAIRED[name](p, r, labels, 0.4), (policy, reference))


@pytest.mark.parametrize("name", UNPAIRED)
def test_dtype_is_kept_and_no_value_is_looked_at(name):
    for dtype in (torch.float32, torch.float64):
        baseline = torch.tensor(0.3, dtype=dtype, device="meta")
        labels = torch.ones(4, dtype=torch.bool, device="meta")
        policy, reference = torch.zeros(2, 4, dtype=dtype, device="meta").unbind()
        values = UNPAIRED[name](policy, reference, labels, baseline)
        assert values.shape == (4,) and values.dtype == dtype


@pytest.mark.parametrize("name", UNPAIRED)
def test_bad_input_is_refused_in_one_sentence(name):
    loss = UNPAIRED[name]
    with pytest.raises(InputError, match=r"labels is a \(2,\) int64 tensor on cpu; expected a \(2,\) bool tensor"):
        loss(LOGPROBS, REFERENCE, LABELS.long(), 0.0)
    with pytest.raises(InputError, match=r"labels is a \(1,\) bool tensor"):
        loss(LOGPROBS, REFERENCE, LABELS[:1], 0.0)
    with pytest.raises(InputError, match=r"ref_logprobs is a .* float32 .* expected the same shape"):
        loss(LOGPROBS, REFERENCE.float(), LABELS, 0.0)
    with pytest.raises(InputError, match="beta is 0; expected a finite number above 0"):
        loss(LOGPROBS, REFERENCE, LABELS, 0.0, beta=0)


def test_negative_weights_are_refused():
    with pytest.raises(InputError, match=r"weights is \(1\.0, -1\.0\); expected \(desirable, undesirable\)"):
        kto(LOGPROBS, REFERENCE, LABELS, 0.0, weights=(1.0, -1.0))
