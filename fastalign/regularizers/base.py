"""The contract of a regulariser, a term that holds a model near what it knew while it is trained.

    PreferenceTrainer(model, args, rows, regularizers=[EWC("fisher.safetensors", 100), KLToStart(0.1)])

A *regulariser* is an object with a method `start(trainer)`. The trainer calls it once before training, while the model
still has the weights that training starts from. It returns a *term*, or None if it acts in another way.

A *term* is a function from a micro-batch (a `Step`) to what is added to the loss, and metrics as pairs (sum, count). A
term with an attribute `state`, a dict of tensors, has them saved in checkpoints.

A step of the optimiser may consist of several micro-batches. Eight of one row and one of eight must give the same
update, so

- a sum over tokens or rows is divided by the totals of the whole step (`Step.totals`), and
- a penalty that does not depend on the batch is added with the first micro-batch only (`once_a_step`).

Terms do not know of each other, so all can be combined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastalign.data.batch import Batch
from fastalign.errors import ConfigError
from fastalign.models.head import Head, token_divergence
from fastalign.models.scoring import Scores
from fastalign.objectives.base import Metrics, Totals

Term = Callable[["Step"], tuple[Tensor, Metrics]]


class Regularizer(Protocol):
    """What the trainers take as a regulariser."""

    def start(self, trainer: Any) -> Term | None:
        """Called once before training; returns the term, or None if it acts in another way."""
        ...


@dataclass
class Step:
    """One micro-batch, as terms see it.

    Attributes:
        model: the model as the trainer calls it, in the wrappers of distributed training.
        batch: the micro-batch.
        scores: of the batch under the model, with hidden states.
        loss: the objective's loss of the batch, before any term.
        totals: items and tokens of all micro-batches of this step of the optimiser.
        first: whether this is the first micro-batch of the step.
        rows: rows of all micro-batches of the step, on this process.
        epoch: the current epoch, as a fraction.
        score_start: computes the batch's scores and the output layer under the weights that training started from.
            Terms share one computation.
    """

    model: nn.Module
    batch: Batch
    scores: Scores
    loss: Tensor
    totals: Totals
    first: bool
    rows: int
    epoch: float
    score_start: Callable[[], tuple[Scores, Head]]

    def completion_hidden(self, scores: Scores) -> Tensor:
        """The hidden states (S, H) of `scores` that predict tokens of completions. Those of prompts come after them."""
        assert scores.hidden is not None, "the trainer keeps hidden states for terms"
        return scores.hidden[: scores.hidden.shape[0] - self.batch.prompt_tokens]


def mean_divergence(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher: Head, step: Step, strength: float, **options: Any
) -> Tensor:
    """This micro-batch's part of `strength * mean over completion tokens of D(model, teacher)`.

    Args:
        hidden: (S, H), of the model.
        head: the model's output layer.
        teacher_hidden: (S, G), of the teacher.
        teacher: the teacher's output layer.
        step: its totals are what the mean is taken over.
        strength: factor of the mean.
        options: those of `token_divergence`, such as `divergence` and `temperature`.

    Returns:
        A scalar with a gradient.
    """
    # The factor of each token is passed along instead of applied to the result: when it is known before the product,
    # the gradient of a trained output layer is formed in the forward pass, and its logits are computed only once.
    weights = (strength / step.totals.scored).expand(hidden.shape[0])
    return token_divergence(hidden, head, teacher_hidden, teacher, token_weights=weights, **options).sum()


def check_positive(name: str, **values: Any) -> None:
    """Checks options of a regulariser.

    Args:
        name: of the regulariser, for the error.
        values: options by name.

    Raises:
        ConfigError: a value is not a finite number above 0.
    """
    for option, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"{option} of {name} is {value!r}; it must be a number above 0")


def check_share(name: str, **values: Any) -> None:
    """`check_positive`, and each value must lie below 1."""
    check_positive(name, **values)
    for option, value in values.items():
        if value >= 1:
            raise ConfigError(f"{option} of {name} is {value!r}; it must lie between 0 and 1")


def count_of(values: Tensor) -> Tensor:
    """The length of `values` as a tensor on its device, for the count of a metric."""
    return number_on(values.device, values.shape[0])


def number_on(device: torch.device, value: int) -> Tensor:
    """A whole number as a tensor () on a device, filled in there: a copy from the host would make a GPU's host wait."""
    return torch.full((), value, device=device)


def once_a_step(name: str, penalty: Callable[[], Tensor]) -> Term:
    """A term that adds `penalty()` with the first micro-batch of each step of the optimiser.

    Args:
        name: of the metric that shows its value.
        penalty: returns a scalar that does not depend on the batch.
    """

    def term(step: Step) -> tuple[Tensor, Metrics]:
        if not step.first:
            return step.loss.new_zeros(()), {}
        value = penalty()
        return value.to(step.loss.dtype), {name: (value, torch.ones_like(value))}

    return term
