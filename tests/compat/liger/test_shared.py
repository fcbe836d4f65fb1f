"""The sums of logits, without a logit."""

from __future__ import annotations

import pytest
import torch

from fastalign.compat.liger.shared import logits_sum, reference_arguments


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_sum_of_the_logits(problem, with_bias):
    bias = problem.bias if with_bias else None
    expected = torch.nn.functional.linear(problem.hidden, problem.weight, bias).sum((1, 2))
    result = logits_sum(problem.hidden, problem.weight, bias)
    torch.testing.assert_close(result, expected.detach(), rtol=1e-12, atol=1e-12)
    assert not result.requires_grad


def test_without_a_reference_model_its_log_probabilities_are_zero(problem):
    arguments = reference_arguments(False, problem.target, *problem.ref)
    assert arguments.keys() == {"ref_logps"} and not arguments["ref_logps"].any()
