"""What holds a model near what it knew while it is trained: `PreferenceTrainer(..., regularizers=[EWC(...), ...])`.

A regulariser is anything with a method `start(trainer)`, called once before training, when the model still has the
weights it starts from. It returns a term, or None if it acts in other ways. A term takes each micro-batch as a `Step`
and returns what is added to the loss, and metrics as (sum, count). What is summed over tokens or rows is divided by the
totals of the whole accumulated batch, and what stands once a step is added with its first micro-batch: 8 micro-batches
of 1 and 1 of 8 give the same update. Terms do not know of each other, so all combine.

Here: EWC, L2-SP, KL to the start. In files of their own: `Replay`, `LayerWise`, `Distillation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastalign.data.batch import Batch
from fastalign.errors import ConfigError
from fastalign.models.head import Head, token_divergence
from fastalign.models.scoring import Scores
from fastalign.objectives.base import Metrics, Totals

Term = Callable[["Step"], tuple[Tensor, Metrics]]


@dataclass
class Step:
    """One micro-batch, as terms see it."""

    model: nn.Module  # as it is called: wrapped, where training wraps it
    batch: Batch
    scores: Scores  # of the batch under the model, hidden states included
    loss: Tensor  # the objective's, before any term
    totals: Totals  # of all micro-batches of this optimiser step
    first: bool  # whether it is the first of them
    rows: int  # rows of all of them, on this process
    epoch: float
    at_start: Callable[[], tuple[Scores, Head]]  # the batch under the weights that training started from

    def completions(self, values: Tensor) -> Tensor:
        """The part of `values (S, ...)` that belongs to tokens of completions."""
        return values[: values.shape[0] - self.batch.prompt_tokens]


def mean_divergence(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher: Head, step: Step, strength: float, **options
) -> Tensor:
    """`strength` times the divergence from the teacher, this micro-batch's part of the mean over completion tokens."""
    # known before the product, so that a trainable head's gradient is formed in the forward pass
    weights = (strength / step.totals.scored).expand(hidden.shape[0])
    return token_divergence(hidden, head, teacher_hidden, teacher, token_weights=weights, **options).sum()


def check_positive(name: str, **values: float) -> None:
    """ConfigError unless each value is a finite number above 0."""
    for option, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"{option} of {name} is {value!r}; it must be a number above 0")


def count_of(values: Tensor) -> Tensor:
    """The length of `values`, as a metric's count."""
    return torch.tensor(values.shape[0], device=values.device)


def once_a_step(name: str, penalty: Callable[[], Tensor]) -> Term:
    def term(step: Step) -> tuple[Tensor, Metrics]:
        if not step.first:
            return step.loss.new_zeros(()), {}
        value = penalty()
        return value.to(step.loss.dtype), {name: (value, torch.ones_like(value))}

    return term
