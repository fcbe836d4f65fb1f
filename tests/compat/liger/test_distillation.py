"""Liger's distillation losses under our names, against their formulas on materialised float64 logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, log_softmax, nll_loss, normalize, pad

from fastalign.compat import liger
from fastalign.errors import ConfigError, InputError


def sides(problem, teacher_vocab=17):
    """Student (hidden, weight, bias), teacher (hidden, weight, bias) and labels, one row per token."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(36, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(teacher_vocab, 7, generator=generator, dtype=torch.float64)
    bias = torch.randn(teacher_vocab, generator=generator, dtype=torch.float64)
    return (
        (problem.hidden.flatten(0, 1), problem.weight, problem.bias),
        (teacher, weight, bias),
        problem.target.flatten(),
    )


def divergence(student, teacher, beta, temperature):
    s, t = log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1)
    if beta in (0, 1):
        p, q = (t, s) if beta == 0 else (s, t)
        return (p.exp() * (p - q)).sum(-1)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)


def cosine(student, teacher, beta, temperature):
    return beta * (1 - (normalize(student, dim=-1) * normalize(teacher, dim=-1)).sum(-1))


@pytest.mark.parametrize("extra", [0, 4], ids=["same vocabulary", "larger teacher"])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize(("name", "distance"), [("JSD", divergence), ("CosineSimilarity", cosine)])
def test_against_logits(problem, name, distance, beta, extra):
    student, teacher, labels = sides(problem, 17 + extra)
    scored, logits = labels >= 0, linear(*student)
    hard = nll_loss(log_softmax(logits, -1), labels, ignore_index=-100)
    soft = distance(pad(logits, (0, extra)), linear(*teacher), beta, 2.0)[scored].mean()
    module = getattr(liger, f"LigerFusedLinear{name}Loss")(0.3, 0.8, beta, temperature=2.0, return_soft_hard_loss=True)
    loss, *parts = module(*student[:2], *teacher[:2], labels, student[2], teacher[2])
    problem.check((loss, parts), 0.3 * hard + 0.8 * soft, (soft.detach(), hard.detach()))


@pytest.mark.parametrize(("name", "function"), [("JSD", "jsd"), ("CosineSimilarity", "cosine")])
def test_the_functions_take_their_arguments_in_ligers_order(problem, name, function):
    student, teacher, labels = sides(problem)
    call = getattr(liger, f"liger_fused_linear_{function}")
    assert getattr(liger, f"LigerFusedLinear{name}Function").apply is call
    inputs = *student[:2], *teacher[:2], labels, student[2], teacher[2]
    module = getattr(liger, f"LigerFusedLinear{name}Loss")(0.3, 0.8, 0.4, temperature=2.0)
    problem.check((call(*inputs, 0.3, 0.8, 0.4, -100, 2.0, True, 8, False), ()), module(*inputs), ())


@pytest.mark.parametrize("name", ["JSD", "CosineSimilarity"])
def test_without_labels_the_loss_is_zero_and_differentiable(problem, name):
    student, teacher, labels = sides(problem)
    module = getattr(liger, f"LigerFusedLinear{name}Loss")()
    loss = module(*student[:2], *teacher[:2], torch.full_like(labels, -100), student[2], teacher[2])
    grads = torch.autograd.grad(loss, problem[:3], materialize_grads=True)
    assert loss == 0 and not any(grad.any() for grad in grads)


def test_what_does_not_fit_says_so(problem):
    with pytest.raises(ConfigError, match="temperature is 0; expected a number above 0"):
        liger.LigerFusedLinearJSDLoss(temperature=0)
    student, teacher, labels = sides(problem, 16)
    with pytest.raises(InputError, match="the student's vocabulary has 17 entries and the teacher's 16"):
        liger.liger_fused_linear_jsd(*student[:2], *teacher[:2], labels, student[2], teacher[2])
