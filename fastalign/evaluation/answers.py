"""What a run did to a model: answers to held-out prompts before and after, and the table that compares the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastalign.rollout.in_process import generate


@dataclass
class Answers:
    """Greedy answers to some prompts."""

    texts: list[str]
    lengths: list[int]  # tokens, EOS included
    finished: list[bool]  # ended by itself, within the budget

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / len(self.lengths)

    @property
    def finished_share(self) -> float:
        return sum(self.finished) / len(self.finished)


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 160,
    batch_size: int = 32,
    label: str = "answers",
) -> Answers:
    """Greedy answers to tokenised prompts, each the model's most likely token at every step until EOS."""
    tokens = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, label=label)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
    return Answers(texts, list(map(len, tokens)), [ids[-1] == tokenizer.eos_token_id for ids in tokens])


def comparison(before: dict, after: dict, answers: tuple[Answers, Answers] | None) -> list[dict]:
    """Rows of the before/after table, from two evaluations of the trainer and the answers before and after.

    Each row: metric, before, after, unit, better ("up", "down" or None). Metrics that a run does not have are left out.
    """
    known = [
        ("Held-out loss", "eval_loss", "", "down"),
        ("Prefers chosen, by reward", "eval_rewards/accuracies", "%", "up"),
        ("Prefers chosen, by log-prob a token", "eval_logps/accuracies", "%", "up"),
        ("Reward margin", "eval_rewards/margins", "", "up"),
        ("KL to the start, a token", "eval_kl", "nats", None),
    ]
    rows = []
    for metric, key, unit, better in known:
        if key in after:
            start = before.get(key)
            if key == "eval_rewards/accuracies" and before.get("eval_rewards/margins") == 0:
                start = None  # all margins are 0 before the first step: there is no preference to count
            values = [100 * v if unit == "%" and v is not None else v for v in (start, after[key])]
            rows.append({"metric": metric, "before": values[0], "after": values[1], "unit": unit, "better": better})
    if answers is not None:
        old, new = answers
        # None: which way is better depends on what was trained
        rows.append({"metric": "Mean answer length", "before": old.mean_length, "after": new.mean_length,
                     "unit": "tokens", "better": None})  # fmt: skip
        rows.append({"metric": "Answers that end by themselves", "before": 100 * old.finished_share,
                     "after": 100 * new.finished_share, "unit": "%", "better": "up"})  # fmt: skip
    return rows
