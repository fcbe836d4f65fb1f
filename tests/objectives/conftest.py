"""Shared by the objectives' tests: batches and log-probs of completions of given lengths."""

import pytest
import torch

from fastalign.data.batch import Batch
from fastalign.data.packing import pack
from fastalign.objectives.base import Totals


@pytest.fixture(scope="session")
def make_batch():
    """f(lengths, labels): a batch of rows whose completions have these lengths."""

    def make(lengths, labels=None) -> Batch:
        examples = [{"prompt_ids": [1, 2], "completion_ids": [[3] * n for n in pair]} for pair in lengths]
        return Batch(pack(examples), {} if labels is None else {"label": torch.tensor(labels)})

    return make


@pytest.fixture(scope="session")
def make_logprobs():
    """f(lengths, seed): a log-prob below -0.1 for each of their tokens."""

    def make(lengths, seed=0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return -torch.rand(sum(map(sum, lengths)), generator=generator, dtype=torch.float64) - 0.1

    return make


@pytest.fixture(scope="session")
def sums():
    """f(logprobs, lengths): the sums over the first and over the second completions."""

    def add_up(logprobs, lengths):
        parts = logprobs.split([n for pair in lengths for n in pair])
        totals = torch.stack([part.sum() for part in parts])
        return totals[0::2], totals[1::2]

    return add_up


@pytest.fixture(scope="session")
def in_parts(make_batch):
    """f(objective, lengths, logprobs, reference, cut): the loss of two micro-batches of one accumulated batch."""

    def loss(objective, lengths, logprobs, reference, cut):
        tokens = sum(map(sum, lengths[:cut]))
        parts = [(lengths[:cut], slice(0, tokens)), (lengths[cut:], slice(tokens, None))]
        batches = [make_batch(part) for part, _ in parts]
        totals = Totals(*map(sum, zip(*(objective.totals(batch) for batch in batches), strict=True)))
        return sum(
            objective(logprobs[rows], None if reference is None else reference[rows], batch, totals)[0]
            for batch, (_, rows) in zip(batches, parts, strict=True)
        )

    return loss
