"""The objective of supervised fine-tuning."""

import pytest
import torch

from fastalign.objectives.sft import SFTObjective


def test_sft_is_the_mean_over_tokens(make_batch, make_logprobs):
    lengths, batch = [(2,), (5,)], make_batch([(2,), (5,)])
    logprobs, objective = make_logprobs(lengths), SFTObjective()
    loss, metrics = objective(logprobs, None, batch, objective.totals(batch))
    assert loss == pytest.approx(-logprobs.mean().item(), rel=1e-12)
    total, count = metrics["lengths/chosen"]
    assert (total.item(), count.item()) == (7, 2)


def test_micro_batches_add_up_to_the_whole_batch(make_batch, make_logprobs, in_parts):
    lengths, objective = [(2,), (5,), (1,)], SFTObjective()
    logprobs, batch = make_logprobs(lengths), make_batch(lengths)
    whole, _ = objective(logprobs, None, batch, objective.totals(batch))
    for cut in (1, 2):
        assert in_parts(objective, lengths, logprobs, None, cut).item() == pytest.approx(whole.item(), rel=1e-12)
    assert objective.weight(objective.totals(batch)) == 8


def test_dft_weighs_each_token_by_its_probability_without_gradient(make_batch, make_logprobs):
    """TRL 1.16's `dft_loss` is the same formula."""
    lengths = [(2,), (4,)]
    objective, batch = SFTObjective(dft=True), make_batch(lengths)
    logprobs = make_logprobs(lengths).requires_grad_()
    loss, metrics = objective(logprobs, None, batch, objective.totals(batch))
    p = logprobs.detach().exp()
    assert loss.item() == pytest.approx(-(p * logprobs).sum().item() / 6)
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], -p / 6)
    total, count = metrics["nll_loss"]
    assert (total / count).item() == pytest.approx(-logprobs.mean().item())
