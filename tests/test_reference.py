"""The reference ops against arithmetic done by hand or in other words: everything else is held to them."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign import reference

# With hidden (1, 1) and these weight rows the logits are 0, ln 2, ln 3: probabilities 1/6, 1/3, 1/2.
WEIGHT = torch.tensor([[0.0, 0.0], [math.log(2), 0.0], [0.0, math.log(3)]], dtype=torch.float64)
HIDDEN = torch.ones(2, dtype=torch.float64)
ENTROPY = math.log(6) / 6 + math.log(3) / 3 + math.log(2) / 2


@pytest.mark.parametrize(("target", "probability"), [(0, 1 / 6), (1, 1 / 3), (2, 1 / 2)])
def test_logprobs_and_entropy_by_hand(target, probability):
    logprob, entropy = reference.linear_logprobs(HIDDEN, WEIGHT, torch.tensor(target), entropy=True)
    assert logprob.item() == pytest.approx(math.log(probability), rel=1e-14)
    assert entropy.item() == pytest.approx(ENTROPY, rel=1e-14)


def test_bias_scale_and_temperature_enter_in_this_order():
    # z = (0, ln 2, ln 3) + (ln 4, ln 2, 0) = ln (4, 4, 3), times 3, over 6: probabilities as 2, 2, sqrt 3.
    bias = torch.tensor([math.log(4), math.log(2), 0.0], dtype=torch.float64)
    logprob = reference.linear_logprobs(HIDDEN, WEIGHT, torch.tensor(2), bias=bias, logit_scale=3.0, temperature=6.0)
    assert logprob.item() == pytest.approx(math.log(math.sqrt(3) / (4 + math.sqrt(3))), rel=1e-14)


def test_softcap_lies_between_scale_and_temperature():
    z = reference.linear_logits(HIDDEN, WEIGHT, logit_scale=2.0, softcap=1.5, temperature=0.5)
    expected = [1.5 * math.tanh(2 * u / 1.5) / 0.5 for u in (0.0, math.log(2), math.log(3))]
    assert z.tolist() == pytest.approx(expected, rel=1e-14)


def test_ignored_targets_give_zero():
    targets = torch.tensor([2, -7])
    logprobs, entropy = reference.linear_logprobs(HIDDEN.expand(2, 2), WEIGHT, targets, ignore_index=-7, entropy=True)
    assert logprobs.tolist() == pytest.approx([math.log(1 / 2), 0.0], rel=1e-14)
    assert entropy.tolist() == pytest.approx([ENTROPY, 0.0], rel=1e-14)


def test_masked_vocabulary_entry_leaves_the_others():
    bias = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64)
    logprob, entropy = reference.linear_logprobs(HIDDEN, WEIGHT, torch.tensor(1), bias=bias, entropy=True)
    assert logprob.item() == pytest.approx(math.log(2 / 3), rel=1e-14)
    assert entropy.item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2), rel=1e-14)


def test_masked_vocabulary_entry_leaves_the_gradients_finite():
    bias = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    _, entropy = reference.linear_logprobs(HIDDEN, WEIGHT, torch.tensor(1), bias=bias, entropy=True)
    entropy.backward()
    # d entropy / d z_j = -p_j (log p_j + entropy) with p = (1/3, 2/3, 0).
    expected = [-(math.log(1 / 3) + entropy.item()) / 3, -(math.log(2 / 3) + entropy.item()) * 2 / 3, 0.0]
    assert bias.grad.tolist() == pytest.approx(expected, rel=1e-13)


def test_selective_logprobs_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(9), 0.0]], dtype=torch.float64)
    assert reference.selective_logprobs(logits, torch.tensor([1, -100])).tolist() == pytest.approx(
        [math.log(0.75), 0.0]
    )
    halved = reference.selective_logprobs(logits, torch.tensor([-100, 0]), temperature=2.0)
    assert halved.tolist() == pytest.approx([0.0, math.log(0.75)], rel=1e-14)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(low):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(4, 64, generator=generator) * 3).to(low)
    weight, targets = torch.randn(32, 64, generator=generator).to(low), torch.arange(4)
    logprobs = reference.linear_logprobs(hidden, weight, targets)
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets)
    assert logprobs.dtype == torch.float32 and exact.dtype == torch.float64
    # H rounded products a logit, each of at most max|h| max|w|, at float32's unit roundoff.
    bound = 2 * 64 * hidden.abs().max().item() * weight.abs().max().item() * torch.finfo(torch.float32).eps
    assert (logprobs - exact).abs().max().item() <= bound


def test_segment_sum_by_hand():
    values, cu_seqlens = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 1, 1, 4])
    assert reference.segment_sum(values, cu_seqlens).tolist() == [1.0, 0.0, 14.0]
    assert reference.segment_sum(values[:0], torch.tensor([0])).shape == (0,)


# s = (1/4, 3/4), t = (1/2, 1/2).
STUDENT = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
TEACHER = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
FORWARD_KL = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
REVERSE_KL = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
# m = (t + s) / 2 = (3/8, 5/8).
JSD = 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)) + 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5))
# m = t / 4 + 3 s / 4 = (5/16, 11/16).
JSD_QUARTER = 0.25 * (0.5 * math.log(8 / 5) + 0.5 * math.log(8 / 11)) + 0.75 * (
    0.25 * math.log(4 / 5) + 0.75 * math.log(12 / 11)
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"divergence": "forward_kl"}, FORWARD_KL),
        ({"divergence": "reverse_kl"}, REVERSE_KL),
        ({"divergence": "jsd"}, JSD),
        ({"divergence": "jsd", "jsd_beta": 0.25}, JSD_QUARTER),
    ],
)
def test_divergences_by_hand(options, expected):
    assert reference.logits_divergence(STUDENT, TEACHER, **options).item() == pytest.approx(expected, rel=1e-12)
    # Logits at twice the temperature and twice the size are the same distributions.
    doubled = reference.logits_divergence(2 * STUDENT, 2 * TEACHER, temperature=2.0, **options)
    assert doubled.item() == pytest.approx(expected, rel=1e-12)


def test_unknown_divergence_is_named():
    with pytest.raises(ValueError, match=r"'tv'.*forward_kl"):
        reference.logits_divergence(STUDENT, TEACHER, divergence="tv")
