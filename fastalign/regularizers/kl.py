"""The exact KL divergence to the model that training started from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastalign.models.adapters import causal_lm
from fastalign.models.head import output_head
from fastalign.objectives.base import Metrics
from fastalign.options import help_field, one_of
from fastalign.reference import DIVERGENCES, Divergence
from fastalign.regularizers.base import Step, Term, check_positive, check_share, count_of, mean_divergence


@dataclass
class KLToStart:
    """Adds `strength * mean over completion tokens of D(now, start)`.

    D is exact: it is computed over the whole vocabulary at every token, not estimated from the tokens of the data.

    Args:
        strength: factor of the mean, above 0.
        divergence: "reverse_kl" is `KL(now || start)`, the penalty of RLHF; "forward_kl" is `KL(start || now)`; "jsd"
            is the generalised Jensen-Shannon divergence (Agarwal et al. 2024, arXiv:2306.13649).
        jsd_beta: the start's share in jsd, between 0 and 1.

    Raises:
        ConfigError: an option has a wrong value.
    """

    strength: float = field(metadata={"help": "Factor of the mean divergence per completion token."})
    divergence: Divergence = help_field(
        "reverse_kl", "reverse_kl: KL(now || start); forward_kl: KL(start || now); or jsd."
    )
    jsd_beta: float = help_field(0.5, "The start's share in jsd.")

    def __post_init__(self):
        check_positive("KLToStart", strength=self.strength)
        one_of("divergence", self.divergence, DIVERGENCES)
        check_share("KLToStart", jsd_beta=self.jsd_beta)

    def start(self, trainer: Any) -> Term:
        """The term for a trainer, whose model has the weights that training starts from.

        Raises:
            ConfigError: an option has a wrong value.
        """
        trainer.keep_start()

        def term(step: Step) -> tuple[Tensor, Metrics]:
            start_scores, start_head = step.score_start()
            hidden = step.completion_hidden(step.scores)  # (S, H)
            loss = mean_divergence(
                hidden, output_head(causal_lm(step.model)), step.completion_hidden(start_scores), start_head, step,
                self.strength, divergence=self.divergence, jsd_beta=self.jsd_beta,
            )  # fmt: skip
            return loss, {"kl_to_start": (loss * step.totals.scored / self.strength, count_of(hidden))}

        return term
