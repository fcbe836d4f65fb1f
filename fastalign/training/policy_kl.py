"""The divergence of a policy from its start: as a term of the loss, as metrics, and kept near a target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.models.adapters import causal_lm
from fastalign.models.head import output_head
from fastalign.objectives.base import Metrics, mean_of
from fastalign.ops import segment_sum
from fastalign.regularizers.base import Step, Term, mean_divergence

# Above this multiple of the target beta grows, below the inverse part it shrinks.
_ABOVE, _BELOW = 1.5, 0.5


class PolicyKL:
    """A regulariser: `beta * mean over tokens of KL(policy || start)`, exact over the whole vocabulary at every token.

    Its gradient is exact for the states that were sampled. How the policy changes which states it gets to is left out:
    only the policy gradient of a KL inside the reward has that part.

    Metrics are the exact divergence and two estimates from the tokens that were drawn: k1, the mean of
    `log policy - log start`, and k3, the mean of `exp(-d) - 1 + d` with d that difference.

    Args:
        beta: The weight at the start, above 0.
        target: Nats, summed over an answer and averaged over answers, that the divergence is steered to; None: none.
        temperature: Of both distributions.
    """

    def __init__(self, beta: float, target: float | None, temperature: float):
        self.beta, self.target, self.temperature = beta, target, temperature

    def start(self, trainer: Any) -> Term:
        """The term for a trainer, whose model has the weights that training starts from."""
        trainer.keep_start()
        return _Term(self.beta, self.target, self.temperature)


class _Term:
    """The term. Its state is in checkpoints: beta, and what the last step measured."""

    def __init__(self, beta: float, target: float | None, temperature: float):
        self.target, self.temperature = target, temperature
        self.beta = torch.tensor(beta, dtype=torch.float64)
        self.measured = torch.zeros(2, dtype=torch.float64)  # nats and answers of the present step

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to save."""
        return {"policy_kl.beta": self.beta, "policy_kl.measured": self.measured}

    def __call__(self, step: Step) -> tuple[Tensor, Metrics]:
        """The divergence of one micro-batch, weighted."""
        if step.first:
            self._adapt()
        start_scores, start_head = step.score_start()
        hidden, beta = step.completion_hidden(step.scores), self.beta.item()
        # Of the factor 1, so that the metric exists where beta has become very small.
        mean = mean_divergence(
            hidden, output_head(causal_lm(step.model)), step.completion_hidden(start_scores), start_head, step, 1.0,
            divergence="reverse_kl", temperature=self.temperature,
        )  # fmt: skip
        nats, bounds = mean.detach() * step.totals.scored, step.batch.packed.cu_seqlens
        self.measured += torch.stack([nats.double().cpu(), torch.tensor(bounds.numel() - 1.0, dtype=torch.float64)])
        assert step.scores.logprobs is not None and start_scores.logprobs is not None, (
            "batches of training have targets"
        )
        difference = (step.scores.logprobs - start_scores.logprobs).detach()  # (S,)
        k3 = torch.expm1(-difference) + difference
        metrics = {
            "kl": (nats, torch.full_like(nats, hidden.shape[0])),
            "kl/answer": (nats, torch.full_like(nats, bounds.numel() - 1)),
            "kl/k1": mean_of(difference),
            "kl/k3": mean_of(k3),
            "kl/beta": mean_of(torch.full((1,), beta, device=nats.device)),
            "kl/k1_answer": mean_of(segment_sum(difference, bounds)),
        }
        return beta * mean, metrics

    def _adapt(self) -> None:
        """Changes beta by what the last step measured."""
        nats, answers = self.measured.tolist()
        self.measured.zero_()
        if self.target is None or not answers:
            return
        if nats / answers > _ABOVE * self.target:
            self.beta *= 1.5
        elif nats / answers < _BELOW * self.target:
            self.beta *= 0.5
