"""Losses over pairs by name, and weighted mixtures of them."""

from __future__ import annotations

import pytest
import torch

from fastalign.errors import InputError
from fastalign.losses import (
    LENGTH_NORMALISED,
    PAIRWISE,
    REFERENCE_FREE,
    bco_pair,
    dpo,
    exo,
    ipo,
    orpo,
    pairwise_loss,
    simpo,
)

GENERATOR = torch.Generator().manual_seed(0)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = (-30 * torch.rand(4, 5, dtype=torch.float64, generator=GENERATOR)).unbind()
SUMS = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
LENGTHS = {"lengths_chosen": torch.tensor([4, 9, 2, 7, 5]), "lengths_rejected": torch.tensor([3, 3, 8, 1, 6])}
AVERAGES = tuple(tensor / lengths for tensor, lengths in zip(SUMS, [*LENGTHS.values()] * 2, strict=True))


@pytest.mark.parametrize("name", PAIRWISE)
def test_one_loss_gets_the_logprobs_it_is_defined_on(name):
    logprobs = (AVERAGES if name in LENGTH_NORMALISED else SUMS)[: 2 if name in REFERENCE_FREE else 4]
    assert torch.equal(pairwise_loss(name, None, *SUMS, **LENGTHS), PAIRWISE[name].function(*logprobs))


def test_a_mixture_is_the_weighted_sum_and_shares_options():
    mixed = pairwise_loss(
        ["sigmoid", "bco_pair", "ipo"], [0.8, 0.2, 0.5], *SUMS, **LENGTHS, options={"beta": 0.3, "label_smoothing": 0.1}
    )
    expected = 0.8 * dpo(*SUMS, beta=0.3, label_smoothing=0.1)
    expected = expected + 0.2 * bco_pair(*SUMS, beta=0.3) + 0.5 * ipo(*AVERAGES, beta=0.3)
    torch.testing.assert_close(mixed, expected, rtol=1e-14, atol=0)


def test_weights_are_one_each_where_none_are_given():
    expected = dpo(*SUMS) + exo(*SUMS)
    torch.testing.assert_close(pairwise_loss(["dpo", "exo"], None, *SUMS), expected, rtol=1e-14, atol=0)


def test_ipo_on_sums_as_the_paper_writes_it():
    values = pairwise_loss("ipo", None, *SUMS, length_normalised=LENGTH_NORMALISED - {"ipo"})
    assert torch.equal(values, ipo(*SUMS))


def test_reference_free_losses_need_no_reference():
    mixed = pairwise_loss(["simpo", "orpo"], [1.0, 2.0], CHOSEN, REJECTED, **LENGTHS)
    torch.testing.assert_close(mixed, simpo(*AVERAGES[:2]) + 2 * orpo(*AVERAGES[:2]), rtol=1e-14, atol=0)


def test_a_completion_without_scored_tokens_is_finite():
    zero = torch.zeros(1, requires_grad=True)
    lengths = {"lengths_chosen": torch.tensor([0]), "lengths_rejected": torch.tensor([3])}
    values = pairwise_loss(["ipo", "orpo"], None, zero, -torch.ones(1), zero.detach(), -torch.ones(1), **lengths)
    (grad,) = torch.autograd.grad(values.sum(), zero)
    assert torch.isfinite(values).all() and torch.isfinite(grad).all()


def test_float32_stays_float32():
    single = [tensor.float() for tensor in SUMS]
    assert pairwise_loss(["dpo", "ipo"], [0.5, 0.5], *single, **LENGTHS).dtype == torch.float32


def test_a_mixture_of_all_losses_compiles_into_one_graph():
    weights = [0.5 + 0.1 * k for k in range(len(PAIRWISE))]
    expected = pairwise_loss(list(PAIRWISE), weights, *SUMS, **LENGTHS)
    compiled = torch.compile(pairwise_loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(list(PAIRWISE), weights, *SUMS, **LENGTHS), expected)


BAD_CALLS = [
    (("sigmoud", None), {}, "loss_type 'sigmoud' is unknown; did you mean 'sigmoid'"),
    (("zzz", None), {}, "loss_type 'zzz' is unknown; choose from dpo, "),
    (("sft", None), {}, "loss_type 'sft' is a mean over tokens"),
    (([], None), {}, "loss_types is empty"),
    ((["dpo", "exo"], [1.0]), {}, r"loss_weights is \[1\.0\] for loss_types \['dpo', 'exo'\]"),
    (("dpo", [float("inf")]), {}, "expected one finite weight per loss"),
    (("dpo", None), {"options": {"bta": 0.1}}, "option 'bta' is taken by no loss; did you mean 'beta'"),
    (("dpo", None), {"options": {"zzzz": 0.1}}, "option 'zzzz' is taken by no loss; choose from alpha, beta, "),
    (("dpo", None), {"length_normalised": {"dpoo"}}, "loss_type 'dpoo' is unknown; did you mean 'dpo'"),
    (("ipo", None), {}, r"lengths_chosen is None; 'ipo' needs averages per token: .* shape \(5,\)"),
    (
        ("ipo", None),
        {"lengths_chosen": torch.ones(5), "lengths_rejected": torch.ones(1)},
        r"lengths_rejected is a \(1,\)",
    ),
]


@pytest.mark.parametrize(("losses", "options", "sentence"), BAD_CALLS)
def test_bad_input_is_refused_in_one_sentence(losses, options, sentence):
    with pytest.raises(InputError, match=sentence):
        pairwise_loss(*losses, *SUMS, **options)


def test_a_missing_reference_is_named_with_the_loss_that_needs_it():
    with pytest.raises(InputError, match="ref_rejected is None and 'exo' needs both"):
        pairwise_loss(["cpo", "exo"], None, CHOSEN, REJECTED, REF_CHOSEN)
