"""Draws follow the softmax over the whole vocabulary, and log-probs are those of what was drawn."""

from __future__ import annotations

import pytest
import torch

from fastalign.rollout.sampling import pick


@pytest.mark.parametrize(("vocabulary", "temperature"), [(7, 1.0), (256, 0.5), (700, 2.0)])
def test_draws_follow_the_distribution(vocabulary, temperature):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(1, vocabulary, generator=generator)
    logits[0, ::3] = -torch.inf
    draws = 60_000
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokens, logprobs = pick(logits.expand(draws, -1), temperature)
    expected = (logits[0].double() / temperature).softmax(-1)
    shares = torch.bincount(tokens, minlength=vocabulary).double() / draws
    assert (shares[::3] == 0).all()
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt() + 2 / draws).all()
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], rtol=0, atol=1e-6)


def test_the_most_likely_token_has_its_log_prob_at_temperature_1():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = pick(logits, None)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", [0, 255, 256, 511, 512, 600])
def test_a_token_that_has_all_probability_is_always_drawn(place):
    """Also at the edges of the blocks that the draw looks up first, where rounding could lead to a neighbour."""
    logits = torch.full((400, 601), -torch.inf)
    logits[:, place] = 3.0
    tokens, logprobs = pick(logits, 1.0)
    assert (tokens == place).all() and (logprobs == 0).all()
