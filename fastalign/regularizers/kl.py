"""The exact KL divergence to the model that training started from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastalign.models.adapters import causal_lm
from fastalign.models.head import output_head
from fastalign.objectives.base import Metrics
from fastalign.options import one_of
from fastalign.reference import DIVERGENCES
from fastalign.regularizers.base import Step, Term, check_positive, count_of, mean_divergence


@dataclass
class KLToStart:
    """`strength * mean over completion tokens of D(now, start)`: exact, over the whole vocabulary, at every token.

    divergence: reverse_kl `KL(now || start)`, the penalty of RLHF; forward_kl `KL(start || now)`; jsd (Agarwal et al.
    2024, arXiv:2306.13649), with `jsd_beta` the start's share.
    """

    strength: float
    divergence: str = "reverse_kl"
    jsd_beta: float = 0.5

    def start(self, trainer) -> Term:
        check_positive("KLToStart", strength=self.strength)
        one_of("divergence", self.divergence, DIVERGENCES)
        trainer.keep_start()

        def term(step: Step) -> tuple[Tensor, Metrics]:
            scores, head = step.at_start()
            hidden, then = step.completions(step.scores.hidden), step.completions(scores.hidden)
            loss = mean_divergence(
                hidden, output_head(causal_lm(step.model)), then, head, step, self.strength,
                divergence=self.divergence, jsd_beta=self.jsd_beta,
            )  # fmt: skip
            return loss, {"kl_to_start": (loss * step.totals.scored / self.strength, count_of(hidden))}

        return term
