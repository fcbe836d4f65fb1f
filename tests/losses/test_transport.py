"""Optimal transport: what sorting over the batch does, against numbers worked out by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from fastalign.losses.preference import dpo
from fastalign.losses.transport import aot, aot_unpaired

TOLERANCE = 32 * torch.finfo(torch.float64).eps * 12  # 32 roundings of inputs up to 12


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_one_pair_by_hand(loss):
    # With beta = 1/2: beta m = ln 3 + ln 2 = ln 6, so s(beta m) = 6/7.
    chosen, rejected = column(-10 + 2 * log(3)), column(-12 - 2 * log(2))
    values = loss(chosen, rejected, column(-10), column(-12), beta=0.5)
    assert values.tolist() == pytest.approx([log(7 / 6)], abs=TOLERANCE)


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_aot_of_one_pair_is_dpo(loss, make_logprobs):
    inputs = make_logprobs(4, batch=1)
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


def test_aot_ignores_the_order_of_policy_against_reference_margins(make_logprobs):
    chosen, rejected, ref_chosen, ref_rejected = make_logprobs(4)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    expected = aot(chosen, rejected, ref_chosen, ref_rejected)
    assert torch.equal(aot(chosen, rejected, ref_chosen[order], ref_rejected[order]), expected)
    assert torch.equal(aot(chosen[order], rejected[order], ref_chosen, ref_rejected), expected)
    assert not torch.equal(aot(chosen[order], rejected, ref_chosen, ref_rejected), expected)


def test_aot_unpaired_ignores_the_order_of_chosen_against_rejected(make_logprobs):
    chosen, rejected, ref_chosen, ref_rejected = make_logprobs(4)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    expected = aot_unpaired(chosen, rejected, ref_chosen, ref_rejected)
    assert torch.equal(aot_unpaired(chosen, rejected[order], ref_chosen, ref_rejected[order]), expected)
    assert not torch.equal(aot_unpaired(chosen, rejected[order], ref_chosen, ref_rejected), expected)
