"""What a run did to a model: answers to held-out prompts before and after, and the table that compares the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase


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


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    label: str | None = None,
    temperature: float | None = None,
) -> list[list[int]]:
    """Tokens of an answer to each tokenised prompt, up to and with EOS; greedy, or drawn at a temperature.

    Prompts of like length share a batch, padded on the left. label: of a progress bar; None shows none. The model is
    put in eval mode and back.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[]] * len(prompts)
    stop, device = tokenizer.eos_token_id, next(model.parameters()).device
    fill = stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    training, _ = model.training, model.eval()
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=label, unit="batch", leave=False, disable=label is None):
        rows = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in rows)
        padding = [width - len(prompts[i]) for i in rows]
        ids = torch.tensor([[fill] * pad + list(prompts[i]) for i, pad in zip(rows, padding, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=temperature is not None,
            max_new_tokens=max_new_tokens, pad_token_id=fill, eos_token_id=stop, temperature=temperature, top_p=None,
            top_k=None if temperature is None else 0,
        )[:, width:].tolist()  # fmt: skip
        for i, tokens in zip(rows, out, strict=True):
            answers[i] = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
    model.train(training)
    return answers


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
