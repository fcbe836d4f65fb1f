"""Liger's losses over pairs under our names, against their formulas on log-probabilities from the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from fastalign.compat import liger
from fastalign.errors import ConfigError

B = 3


def nll_of(problem):
    return -problem.sums()[:B].sum() / problem.lengths()[:B].sum()


def common(problem, logps, nll):
    """The first five of Liger's auxiliary outputs."""
    logits = (problem.hidden @ problem.weight.t() + problem.bias).detach()
    return (*logps.detach().chunk(2), logits[:B].mean(), logits[B:].mean(), nll.detach())


FORMULAS = {
    "sigmoid": lambda u, v: -logsigmoid(u - v),  # Liger does not smooth this one
    "hinge": lambda u, v: torch.relu(1 - (u - v)),
    "robust": lambda u, v: (-0.9 * logsigmoid(u - v) + 0.1 * logsigmoid(v - u)) / 0.8,
    "nca_pair": lambda u, v: -logsigmoid(u) - 0.5 * logsigmoid(-u) - 0.5 * logsigmoid(-v),
    "bco_pair": lambda u, v: -logsigmoid(u) - logsigmoid(-v),
    "sppo_hard": lambda u, v: (u / 0.2 - 2.5) ** 2 + (v / 0.2 + 2.5) ** 2,
    "apo_zero": lambda u, v: 1 - torch.sigmoid(u) + torch.sigmoid(v),
    "apo_down": lambda u, v: torch.sigmoid(u) + 1 - torch.sigmoid(u - v),
}


@pytest.mark.parametrize("average", [False, True], ids=["sums", "averages"])
@pytest.mark.parametrize("loss_type", FORMULAS)
def test_dpo(problem, loss_type, average):
    scale = problem.lengths() if average else 1
    rewards = 0.2 * (problem.sums() - problem.sums(ref=True)) / scale
    loss = FORMULAS[loss_type](*rewards.chunk(2)).mean() + 0.3 * nll_of(problem)
    module = liger.LigerFusedLinearDPOLoss(
        beta=0.2, alpha=0.3, compute_nll_loss=True, average_log_prob=average, loss_type=loss_type, label_smoothing=0.1
    )
    aux = (*common(problem, problem.sums() / scale, nll_of(problem)), *rewards.detach().chunk(2))
    problem.check(module(problem.weight, problem.hidden, problem.target, problem.bias, *problem.ref), loss, aux)


def test_dpo_without_a_reference(problem):
    hidden, weight, bias, target, _ = problem
    sums = problem.sums()
    loss, aux = liger.LigerFusedLinearDPOLoss(use_ref_model=False)(weight, hidden, target, bias)
    torch.testing.assert_close(loss, -logsigmoid(0.1 * (sums[:B] - sums[B:])).mean(), rtol=1e-11, atol=1e-12)
    assert aux[4] == 0  # the NLL was not wanted


@pytest.mark.parametrize("whole", [False, True], ids=["completion", "prompt and completion"])
def test_orpo(problem, whole):
    hidden, weight, bias, target, _ = problem
    nll_target = target.clone()
    nll_target[:, 0] = 4
    nll = nll_of(problem._replace(target=nll_target) if whole else problem)
    average = problem.sums() / problem.lengths()
    odds = average - torch.log(1 - average.exp())
    log_odds = odds[:B] - odds[B:]
    loss = nll - 0.3 * logsigmoid(log_odds).mean()
    extra = (*(0.3 * average).detach().chunk(2), logsigmoid(log_odds).mean().detach(), log_odds.mean().detach())
    result = liger.LigerFusedLinearORPOLoss(beta=0.3)(weight, hidden, target, bias, nll_target if whole else None)
    problem.check(result, loss, (*common(problem, average, nll), *extra))


def test_simpo(problem):
    average = problem.sums() / problem.lengths()
    x = 2.0 * (average[:B] - average[B:]) - 0.7
    loss = 0.4 * nll_of(problem) - 0.9 * logsigmoid(x).mean() - 0.1 * logsigmoid(-x).mean()
    module = liger.LigerFusedLinearSimPOLoss(beta=2.0, alpha=0.4, label_smoothing=0.1, gamma=0.7)
    aux = (*common(problem, average, nll_of(problem)), *(2.0 * average).detach().chunk(2))
    problem.check(module(problem.weight, problem.hidden, problem.target, problem.bias), loss, aux)


@pytest.mark.parametrize("average", [False, True], ids=["sums", "averages"])
def test_cpo(problem, average):
    logps = problem.sums() / (problem.lengths() if average else 1)
    x = 0.3 * (logps[:B] - logps[B:])
    loss = 0.4 * nll_of(problem) - 0.9 * logsigmoid(x).mean() - 0.1 * logsigmoid(-x).mean()
    module = liger.LigerFusedLinearCPOLoss(beta=0.3, alpha=0.4, label_smoothing=0.1, average_log_prob=average)
    aux = (*common(problem, logps, nll_of(problem)), *(0.3 * logps).detach().chunk(2))
    problem.check(module(problem.weight, problem.hidden, problem.target, problem.bias), loss, aux)


# The options that each function takes by position after the bias (and DPO's reference), in Liger's order.
POSITIONS = {
    "DPO": (
        -100, 0.2, True, True, False, True, 1, "robust", 0.1, 0.05, 0.3,
    ),
    "ORPO": (-100, 0.2, False, None, True, 1),
    "SimPO": (-100, 0.2, 0.3, 0.1, True, True, 0.7, 1),
    "CPO": (-100, 0.2, 0.3, 0.1, True, True, True, 1),
}  # fmt: skip
NAMED = {
    "DPO": {
        "alpha": 0.3, "compute_nll_loss": True, "use_ref_model": False, "average_log_prob": True,
        "loss_type": "robust", "label_smoothing": 0.1,
    },
    "ORPO": {"compute_nll_loss": False},
    "SimPO": {"alpha": 0.3, "label_smoothing": 0.1, "gamma": 0.7},
    "CPO": {"alpha": 0.3, "label_smoothing": 0.1, "average_log_prob": True},
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONS)
def test_the_functions_take_their_arguments_in_ligers_order(problem, name):
    hidden, weight, bias, target, _ = problem
    function = getattr(liger, f"liger_fused_linear_{name.lower()}")
    assert getattr(liger, f"LigerFusedLinear{name}Function").apply is function
    positional = function(hidden, weight, target, bias, *[None] * 3 * (name == "DPO"), *POSITIONS[name])
    module = getattr(liger, f"LigerFusedLinear{name}Loss")(beta=0.2, **NAMED[name])
    problem.check(positional, *module(weight, hidden, target, bias))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, r"Unsupported loss_type: 'ipo'"),
        ({"loss_type": "sigmod"}, r"Unsupported loss_type: 'sigmod'; did you mean 'sigmoid'\?"),
        ({"loss_type": "exo_pair"}, r"label_smoothing must be > 0 for loss_type='exo_pair'; got 0.0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must lie in \[0.0, 0.5\).*got 0.5"),
    ],
)
def test_what_cannot_be_is_refused_when_the_module_is_made(options, message):
    with pytest.raises(ConfigError, match=message):
        liger.LigerFusedLinearDPOLoss(**options)


def test_a_module_follows_its_attributes(problem):
    hidden, weight, bias, target, _ = problem
    module = liger.LigerFusedLinearCPOLoss(beta=0.1)
    module.beta = 0.3  # as a schedule of beta does
    problem.check(module(weight, hidden, target, bias), *liger.LigerFusedLinearCPOLoss(beta=0.3)(*_inputs(problem)))


def _inputs(problem):
    return problem.weight, problem.hidden, problem.target, problem.bias


def test_without_an_ignore_index_every_position_is_scored(problem):
    full = problem._replace(target=problem.target.clamp(min=0))
    expected = liger.LigerFusedLinearCPOLoss(average_log_prob=True)(*_inputs(full))
    module = liger.LigerFusedLinearCPOLoss(ignore_index=None, average_log_prob=True)
    full.check(module(*_inputs(full)), *expected)


def test_other_ignore_index_and_low_precision(problem):
    hidden, weight, _, target, _ = problem
    low = hidden.detach().bfloat16(), weight.detach().bfloat16()
    loss, aux = liger.LigerFusedLinearCPOLoss(ignore_index=-7)(low[1], low[0], target.where(target >= 0, -7))
    again, _ = liger.LigerFusedLinearCPOLoss()(low[1], low[0], target)
    assert torch.equal(loss, again) and math.isfinite(loss)
    assert all(t.dtype == torch.float32 for t in (loss, *aux))
