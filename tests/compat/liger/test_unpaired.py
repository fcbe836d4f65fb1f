"""Liger's KTO under our names, against its formula on log-probabilities from the float64 reference."""

from __future__ import annotations

import pytest
import torch

from fastalign.compat import liger
from fastalign.errors import InputError

LABELS = torch.tensor([True, False, True, True, False, False])


@pytest.mark.parametrize("average", [False, True], ids=["sums", "averages"])
@pytest.mark.parametrize("with_reference", [False, True])
def test_kto(problem, with_reference, average):
    hidden, weight, bias, target, ref = problem
    scale = problem.lengths() if average else 1
    logps = problem.sums() / scale
    rewards = 0.3 * (logps - (problem.sums(ref=True) / scale if with_reference else 0))
    loss = (1 - torch.sigmoid((rewards - 0.3 * 0.5) * torch.where(LABELS, 1, -1))).mean()
    logits = (hidden @ weight.t() + bias).sum((1, 2))
    aux = [t[rows].sum().detach() for t in (logps, logits, rewards) for rows in (LABELS, ~LABELS)]
    module = liger.LigerFusedLinearKTOLoss(beta=0.3, use_ref_model=with_reference, average_log_prob=average)
    references = ref if with_reference else (None, None, None)
    problem.check(module(hidden, weight, target, bias, LABELS, *references, kl=torch.tensor([0.5])), loss, aux)
    assert liger.LigerFusedLinearKTOFunction.apply is liger.liger_fused_linear_kto
    options = -100, 0.3, True, with_reference, average, 1
    positional = liger.liger_fused_linear_kto(hidden, weight, target, LABELS, bias, *references, 0.5, *options)
    problem.check(positional, loss, aux)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preference_labels": None}, "preference_labels is None"),
        ({"kl": torch.zeros(6)}, r"kl is a \(6,\) tensor; KTO has one reference point per batch"),
        ({"use_ref_model": True}, "use_ref_model is True, but ref_input is None"),
    ],
)
def test_what_is_missing_says_so(problem, arguments, message):
    hidden, weight, bias, target, _ = problem
    arguments = {"preference_labels": LABELS, "use_ref_model": False} | arguments
    with pytest.raises(InputError, match=message):
        liger.liger_fused_linear_kto(hidden, weight, target, bias=bias, **arguments)
