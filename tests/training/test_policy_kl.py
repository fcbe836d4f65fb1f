"""The gradient of the divergence on a vocabulary of two is the enumerated one, which k1 in the loss does not have."""

from __future__ import annotations

import pytest
import torch

from fastalign.models.head import Head, token_divergence
from fastalign.training.policy_kl import PolicyKL


def enumerated(policy, start):
    """KL(policy || start) over both tokens, per state."""
    return (policy.log_softmax(-1).exp() * (policy.log_softmax(-1) - start.log_softmax(-1))).sum(-1)


def test_the_gradient_on_a_vocabulary_of_two():
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    head = Head(torch.randn(2, 4, generator=torch.Generator().manual_seed(1)), None, 1.0, None)
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    (exact,) = torch.autograd.grad(enumerated(hidden @ head.weight.T, start @ head.weight.T).sum(), hidden)
    ours = token_divergence(hidden, head, start, head, divergence="reverse_kl").sum()
    (found,) = torch.autograd.grad(ours, hidden)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    # k1 as a loss: the expectation over tokens of the gradient of log policy - log start is 0, whatever the start.
    logp = (hidden @ head.weight.T).log_softmax(-1)
    (k1,) = torch.autograd.grad((logp.detach().exp() * logp).sum(), hidden)
    assert k1.abs().max() < 1e-6 < exact.abs().max()


def test_beta_follows_the_target_and_its_state_is_saved():
    term = PolicyKL(0.2, 2.0, 1.0).start(type("Trainer", (), {"keep_start": lambda self: None})())
    trace = []
    for nats in (0.0, 6.1 * 4, 2.9 * 4, 1.1 * 4, 0.9 * 4):  # of four answers
        term.state["policy_kl.measured"].copy_(torch.tensor([nats, 4.0]))
        term._adapt()
        trace.append(term.state["policy_kl.beta"].item())
    assert trace == pytest.approx([0.1, 0.15, 0.15, 0.15, 0.075])
