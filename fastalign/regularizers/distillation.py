"""Distillation as a regulariser: a teacher's distributions pull on the model while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from fastalign.options import help_field, one_of
from fastalign.reference import DIVERGENCES, Divergence
from fastalign.regularizers.base import Step, Term, check_positive, check_share, count_of, mean_divergence

# From a micro-batch, its hidden states (S, H) and the student's output layer to this micro-batch's part of the mean
# divergence from the teacher. The dict holds `divergence`, `jsd_beta` and `temperature`.
DivergenceFromTeacher = Callable[[Step, Tensor, Head, dict[str, Any]], Tensor]


@dataclass
class Distillation:
    """Replaces the loss L of the objective by `a L + (1 - a) tau^2 D`, with D the divergence from a teacher.

    D is the mean over the completions' tokens. It is computed over all entries of the tokenizer's vocabulary, without
    those that only pad the output layer. For a stored teacher it is computed over its k entries and the sum of the rest
    as one more.

    The teacher must have the student's vocabulary. This is checked by its tokenizer. A model object that was not loaded
    from a local folder has none, and must have at least as many entries as the student's tokenizer.

    Args:
        teacher: "start", the weights that training starts from; a model; what `load_model` takes; or a .safetensors
            file of top-k log-probs (`fastalign.models.store_topk`).
        weight: a, from 0 (the teacher alone) to below 1.
        temperature: tau, which divides the logits of both models.
        divergence: "forward_kl" is `KL(teacher || student)` (Hinton et al. 2015, arXiv:1503.02531), "reverse_kl" is
            `KL(student || teacher)`, "jsd" is the generalised Jensen-Shannon divergence (Agarwal et al. 2024,
            arXiv:2306.13649).
        jsd_beta: the teacher's share in jsd, between 0 and 1.
        top_k: compute the teacher's k largest log-probs of every training token once, store them in `cache_dir`, and
            free the teacher. None runs the teacher at every step.
        cache_dir: folder of the stored log-probs, which are named by token ids and weights; None for
            ~/.cache/fastalign.

    Raises:
        ConfigError: an option has a wrong value.
    """

    teacher: str | PreTrainedModel = field(
        metadata={
            "path": True,
            "help": "start, a model folder, .gguf file or name, or a .safetensors file of log-probs.",
        }
    )
    weight: float = help_field(0.5, "Share of the objective's loss, from 0 (the teacher alone) to below 1.")
    temperature: float = help_field(1.0, "Divides the logits of both models.")
    divergence: Divergence = help_field("forward_kl", "forward_kl: KL(teacher || student); reverse_kl; or jsd.")
    jsd_beta: float = help_field(0.5, "The teacher's share in jsd.")
    top_k: int | None = help_field(None, "Store so many log-probs per token once, instead of running the teacher.")
    cache_dir: str | None = field(
        default=None, metadata={"path": True, "help": "Folder of stored log-probs; none: ~/.cache/fastalign."}
    )

    def __post_init__(self):
        check_positive("Distillation", temperature=self.temperature, top_k=1 if self.top_k is None else self.top_k)
        one_of("divergence", self.divergence, DIVERGENCES)
        check_share("Distillation", jsd_beta=self.jsd_beta)
        if not 0 <= self.weight < 1:
            raise ConfigError(f"weight of Distillation is {self.weight}; it must be 0 or more, and below 1")

    def start(self, trainer: Any) -> Term:
        """The term for a trainer, whose model has the weights that training starts from.

        Raises:
            ConfigError: an option does not fit the teacher.
            DataError: a stored teacher lacks training rows, or its file is damaged.
            ModelError: the teacher cannot be loaded, or has another vocabulary.
        """
        divergence, vocabulary = self._divergence_from_teacher(trainer), len(trainer.processing_class)
        options = {"divergence": self.divergence, "jsd_beta": self.jsd_beta, "temperature": self.temperature}

        def term(step: Step) -> tuple[Tensor, Metrics]:
            hidden = step.completion_hidden(step.scores)  # (S, H)
            # Entries beyond the tokenizer's pad the matrix. The divergence cuts a live teacher's layer to as many
            # entries as the student's; a stored teacher's were cut before.
            head = output_head(causal_lm(step.model)).first(vocabulary)
            from_teacher = divergence(step, hidden, head, options)
            # On-policy samples have no ground truth: drop the objective's loss, keep the teacher's part.
            aligned = torch.zeros_like(step.loss) if step.batch.sampled else step.loss
            mixed = distillation_loss(aligned, from_teacher, weight=self.weight, temperature=self.temperature)
            # The trainer adds terms to the objective's loss, so that is taken off here.
            return mixed - step.loss, {"distillation": (from_teacher * step.totals.scored, count_of(hidden))}

        return term

    def _divergence_from_teacher(self, trainer: Any) -> DivergenceFromTeacher:
        if isinstance(self.teacher, str) and self.teacher == "start":
            if self.top_k is not None:
                raise ConfigError(
                    "top_k of Distillation is for a teacher that is another model; leave it out with teacher='start'"
                )
            trainer.keep_start()
            return _from_start
        if isinstance(self.teacher, (str, Path)) and str(self.teacher).endswith(".safetensors"):
            return _from_store(self.teacher, self.temperature, trainer)
        teacher = Teacher.load(self.teacher, trainer)
        if self.top_k is None:
            return _from_teacher(teacher)
        show = trainer.args.should_log and not trainer.args.disable_tqdm
        path = store_topk(teacher, trainer.train_dataset, self.top_k, self.temperature, self.cache_dir, show=show)
        return _from_store(path, self.temperature, trainer)


def _from_start(step: Step, hidden: Tensor, head: Head, options: dict[str, Any]) -> Tensor:
    scores, start_head = step.score_start()
    return mean_divergence(hidden, head, step.completion_hidden(scores), start_head, step, 1.0, **options)


def _from_teacher(teacher: Teacher) -> DivergenceFromTeacher:
    def divergence(step: Step, hidden: Tensor, head: Head, options: dict[str, Any]) -> Tensor:
        return mean_divergence(hidden, head, *teacher(step.batch.rows or []), step, 1.0, **options)

    return divergence


def _from_store(path: str | Path, temperature: float, trainer: Any) -> DivergenceFromTeacher:
    stored = TopK(path)
    stored.check(trainer.processing_class, temperature, trainer.train_dataset)

    def divergence(step: Step, hidden: Tensor, head: Head, options: dict[str, Any]) -> Tensor:
        indices, logprobs = stored(step.batch.rows or [])  # (S, k)
        weights = (1 / step.totals.scored).expand(hidden.shape[0])
        head = head.dense()
        return sparse_divergence(
            hidden, head.dense_weight, indices.to(hidden.device), logprobs.to(hidden.device), token_weights=weights,
            **head.options(), **options,
        ).sum()  # fmt: skip

    return divergence
