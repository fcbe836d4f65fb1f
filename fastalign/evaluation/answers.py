"""What a run did to a model: answers to held-out prompts before and after, and the table that compares the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastalign.rollout.in_process import generate, stop_tokens

# Heading of a row of the table, its key in the trainer's metrics, unit, and which direction is better.
METRICS = (
    ("Held-out loss", "eval_loss", "", "down"),
    ("Prefers chosen, by reward", "eval_rewards/accuracies", "%", "up"),
    ("Prefers chosen, by log-prob per token", "eval_logps/accuracies", "%", "up"),
    ("Reward margin", "eval_rewards/margins", "", "up"),
    ("Mean reward of sampled answers", "eval_reward", "", "up"),
    ("KL to the start, per token", "eval_kl", "nats", None),
)

_ROUNDING = 1e-4  # of a mean margin of rewards, in nats


@dataclass
class Answers:
    """Answers to some prompts, one entry per prompt in each list.

    Attributes:
        texts: The answers, without special tokens and without white space around them.
        lengths: Their lengths in tokens, EOS included.
        finished: Whether each answer ended with EOS before it reached max_new_tokens.
    """

    texts: list[str]
    lengths: list[int]
    finished: list[bool]

    @property
    def mean_length(self) -> float:
        """Mean length of the answers in tokens."""
        return sum(self.lengths) / len(self.lengths)

    @property
    def finished_share(self) -> float:
        """Share of the answers that ended with EOS, 0 to 1."""
        return sum(self.finished) / len(self.finished)


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 160,
    batch_size: int = 32,
    label: str | None = "answers",
    temperature: float | None = None,
) -> Answers:
    """Answers to tokenised prompts, until EOS: greedy ones, with the most likely token at every step, unless drawn.

    Args:
        model: as `fastalign.rollout.generate` takes it.
        tokenizer: the model's tokenizer.
        prompts: token ids of each prompt.
        max_new_tokens: the most tokens of an answer, EOS included.
        batch_size: how many prompts share a batch; it does not change the answers beyond rounding.
        label: the name of the progress bar; None shows none.
        temperature: of answers that are drawn; None: greedy.

    Returns:
        The answers, in the order of the prompts.
    """
    tokens = generate(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, label=label,
        temperature=temperature,
    )  # fmt: skip
    texts = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    stops = stop_tokens(model, tokenizer)
    return Answers(texts, list(map(len, tokens)), [bool(ids) and ids[-1] in stops for ids in tokens])


def comparison(before: dict, after: dict, answers: tuple[Answers, Answers] | None) -> list[dict]:
    """The rows of the table that compares a model before and after training.

    Args:
        before: the trainer's metrics of an evaluation before the first step.
        after: the trainer's metrics of an evaluation after the last step.
        answers: the answers before and after; None if the run generated none.

    Returns:
        For each metric that the run has, a dict of `metric` (its heading), `before`, `after`, `unit`, and `better`
        ("up", "down", or None where either direction may be better).
    """
    rows = []
    for metric, key, unit, better in METRICS:
        if key in after:
            start = before.get(key)
            if key == "eval_rewards/accuracies" and abs(before.get("eval_rewards/margins", 1.0)) < _ROUNDING:
                start = (
                    None  # before the first step all margins are 0 but for rounding: there is no preference to count
                )
            values = [100 * v if unit == "%" and v is not None else v for v in (start, after[key])]
            rows.append({"metric": metric, "before": values[0], "after": values[1], "unit": unit, "better": better})
    if answers is not None:
        old, new = answers
        # None: whether longer answers are better depends on what the model was trained for.
        rows.append({"metric": "Mean answer length", "before": old.mean_length, "after": new.mean_length,
                     "unit": "tokens", "better": None})  # fmt: skip
        rows.append({"metric": "Answers that end by themselves", "before": 100 * old.finished_share,
                     "after": 100 * new.finished_share, "unit": "%", "better": "up"})  # fmt: skip
    return rows
