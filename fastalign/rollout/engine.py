"""What online training wants of whatever samples from the policy: an `Engine`, which turns prompts into `Rollout`s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fastalign.errors import InputError


class Sampling(NamedTuple):
    """How answers are drawn: always from the whole distribution, since cut ones would change the log-probs.

    Attributes:
        max_new_tokens: The most tokens of an answer, the stop token included.
        temperature: Divides the logits, above 0; None takes the most likely token at every step.
    """

    max_new_tokens: int
    temperature: float | None = 1.0


@dataclass
class Rollout:
    """A prompt and its k answers.

    Attributes:
        prompt_ids: The tokens of the prompt.
        completion_ids: The tokens of each answer, with the stop token that ended it.
        logprobs: Per answer the log-probability of each token in nats, at the temperature of the draw (1 for the most
            likely tokens), under the weights that drew it. None if the engine does not know them.
        finished: Whether each answer ended with a stop token.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    logprobs: list[list[float]] | None
    finished: list[bool]


class Engine(Protocol):
    """Samples answers. It has weights of its own, which are those of the policy at the last `sync`."""

    def generate(self, prompts: Sequence[Sequence[int]], k: int, sampling: Sampling) -> list[Rollout]:
        """Samples k answers to each prompt.

        Args:
            prompts: Token ids of each prompt.
            k: Answers to each prompt.
            sampling: How they are drawn.

        Returns:
            One rollout per prompt, in their order.
        """
        ...

    def sync(self, model: Any) -> None:
        """Takes over the present weights of the policy.

        Args:
            model: The policy.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine holds."""
        ...


def check_request(prompts: Sequence[Sequence[int]], k: int, sampling: Sampling) -> None:
    """Checks what an engine is to generate.

    Args:
        prompts: Token ids of each prompt.
        k: Answers to each prompt.
        sampling: How they are drawn.

    Raises:
        InputError: A prompt is empty, or a number is out of its range.
    """
    if k < 1 or sampling.max_new_tokens < 1:
        raise InputError(f"k is {k} and max_new_tokens {sampling.max_new_tokens}; both must be 1 or more")
    if sampling.temperature is not None and not 0 < sampling.temperature < float("inf"):
        raise InputError(
            f"temperature is {sampling.temperature}; it must be above 0 and finite, or None for the most likely tokens"
        )
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"Prompt {number} is empty; a prompt needs at least one token that the answer follows")
