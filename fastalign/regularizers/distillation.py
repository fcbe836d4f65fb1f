"""Distillation as a regulariser: a teacher's distributions pull on the model while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastalign.errors import ConfigError
from fastalign.losses.distillation import distillation_loss
from fastalign.models.adapters import causal_lm
from fastalign.models.head import Head, output_head
from fastalign.models.teacher import Teacher, TopK, store_topk
from fastalign.objectives.base import Metrics
from fastalign.ops.sparse_divergence import sparse_divergence
from fastalign.options import one_of
from fastalign.reference import DIVERGENCES
from fastalign.regularizers.base import Step, Term, check_positive, count_of, mean_divergence


@dataclass
class Distillation:
    """`a L + (1 - a) tau^2 D`: the objective L mixed with the divergence from a teacher at temperature tau.

    teacher: "start", the weights that training starts from; a model, or what `load_model` takes; or a .safetensors file
        of top-k log-probs (`store_topk`). It must have the student's vocabulary, which is checked by its tokenizer; a
        model that was loaded from no local folder has none, and must have no fewer entries.
    weight: a, from 0 (the teacher alone) to below 1. D is the mean over the completions' tokens, over all the
        tokenizer's entries (not what pads the matrix); of a stored teacher over its k entries and the rest as one.
    divergence: forward_kl `KL(teacher || student)` (Hinton et al. 2015, arXiv:1503.02531), reverse_kl
        `KL(student || teacher)`, or jsd with `jsd_beta`, the teacher's share (Agarwal et al. 2024, arXiv:2306.13649).
    top_k: compute the teacher's k largest log-probs of every training token once, keep them in `cache_dir` (default
        ~/.cache/fastalign) by token ids and weights, and let the teacher go. None: ask it at every step.
    """

    teacher: str | PreTrainedModel = field(metadata={"path": True})
    weight: float = 0.5
    temperature: float = 1.0
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    top_k: int | None = None
    cache_dir: str | None = field(default=None, metadata={"path": True})

    def __post_init__(self):
        check_positive("Distillation", temperature=self.temperature, top_k=1 if self.top_k is None else self.top_k)
        one_of("divergence", self.divergence, DIVERGENCES)
        if not 0 <= self.weight < 1:
            raise ConfigError(f"weight of Distillation is {self.weight}; it must be 0 or more, and below 1")

    def start(self, trainer) -> Term:
        ask, vocabulary = self._source(trainer), len(trainer.processing_class)
        options = {"divergence": self.divergence, "jsd_beta": self.jsd_beta, "temperature": self.temperature}

        def term(step: Step) -> tuple[Tensor, Metrics]:
            hidden = step.completions(step.scores.hidden)
            # Entries behind the tokenizer's pad the matrix. A live teacher's are cut to as many, a stored one's were.
            head = output_head(causal_lm(step.model)).first(vocabulary)
            loss = ask(step, hidden, head, options)
            # of the model's own samples only the teacher's opinion counts
            align = torch.zeros_like(step.loss) if step.batch.sampled else step.loss
            mixed = distillation_loss(align, loss, weight=self.weight, temperature=self.temperature)
            # the objective is in the sum already
            return mixed - step.loss, {"distillation": (loss * step.totals.scored, count_of(hidden))}

        return term

    def _source(self, trainer) -> Callable[[Step, Tensor, Head, dict], Tensor]:
        """A function from a micro-batch to its part of the mean divergence from the teacher."""
        if self.teacher == "start":
            if self.top_k is not None:
                raise ConfigError(
                    "top_k of Distillation is for a teacher of its own; leave it out with teacher='start'"
                )
            trainer.keep_start()
            return _from_start
        if str(self.teacher).endswith(".safetensors"):
            return _from_store(self.teacher, self.temperature, trainer)
        teacher = Teacher.load(self.teacher, trainer)
        if self.top_k is None:
            return _from_teacher(teacher)
        path = store_topk(teacher, trainer.train_dataset, self.top_k, self.temperature, self.cache_dir)
        return _from_store(path, self.temperature, trainer)


def _from_start(step: Step, hidden: Tensor, head: Head, options: dict) -> Tensor:
    scores, start = step.at_start()
    return mean_divergence(hidden, head, step.completions(scores.hidden), start, step, 1.0, **options)


def _from_teacher(teacher: Teacher) -> Callable:
    def ask(step: Step, hidden: Tensor, head: Head, options: dict) -> Tensor:
        return mean_divergence(hidden, head, *teacher(step.batch.rows), step, 1.0, **options)

    return ask


def _from_store(path: str | Path, temperature: float, trainer) -> Callable:
    stored = TopK(path)
    stored.check(trainer.processing_class, temperature, trainer.train_dataset)

    def ask(step: Step, hidden: Tensor, head: Head, options: dict) -> Tensor:
        indices, logprobs = stored(step.batch.rows)
        weights = (1 / step.totals.scored).expand(hidden.shape[0])
        return sparse_divergence(
            hidden, head.weight, indices.to(hidden.device), logprobs.to(hidden.device), token_weights=weights,
            **head.options(), **options,
        ).sum()  # fmt: skip

    return ask
