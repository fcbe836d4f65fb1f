"""The small problem that the tests of the drop-in losses share, and the log-probabilities that they expect."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastalign import reference

PAIRS, TOKENS, WIDTH, VOCAB = 3, 6, 5, 17


class Problem(NamedTuple):
    """Float64 inputs, chosen rows first; `ref` is a reference's (hidden, weight, bias)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    ref: tuple[Tensor, Tensor, Tensor]

    def logprobs(self, ref: bool = False) -> Tensor:
        """(2B, T) log-probabilities, 0 where there is no target."""
        hidden, weight, bias = self.ref if ref else self[:3]
        return reference.linear_logprobs(hidden, weight, self.target, bias=bias)

    def sums(self, ref: bool = False) -> Tensor:
        return self.logprobs(ref).sum(1)

    def lengths(self) -> Tensor:
        return (self.target >= 0).sum(1)

    def check(self, result: Any, loss: Tensor, aux: Any) -> None:
        """The result is (loss, aux), and its gradients are those of the expected loss."""
        torch.testing.assert_close([result[0], *result[1]], [loss, *aux], rtol=1e-11, atol=1e-12)
        grads = [torch.autograd.grad(value, self[:3], retain_graph=True) for value in (result[0], loss)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.fixture
def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(VOCAB, (2 * PAIRS, TOKENS), generator=generator)
    target[:, 0] = target[2, 3:] = target[5, 4:] = -100
    layer = random(2 * PAIRS, TOKENS, WIDTH), random(VOCAB, WIDTH), random(VOCAB)
    ref = random(2 * PAIRS, TOKENS, WIDTH), random(VOCAB, WIDTH), random(VOCAB)
    return Problem(layer[0].requires_grad_(), layer[1].requires_grad_(), layer[2].requires_grad_(), target, ref)
