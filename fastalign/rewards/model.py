"""Scores of answers by a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastalign.data.batching import batch_rows
from fastalign.data.packing import Layout, lay_out
from fastalign.data.tokenization import tokenize
from fastalign.errors import InputError
from fastalign.models.fit import check_fit
from fastalign.models.loading import load_tokenizer
from fastalign.models.reward import load_reward_model
from fastalign.models.runs import model_folder
from fastalign.models.scoring import prepare
from fastalign.models.vocabulary import fill_token


class RewardModel:
    """A reward model that scores answers. It is a reward function in TRL's form: call it with prompts and completions.

    Args:
        model: A reward model of transformers, with one label. It is prepared, and put in evaluation mode, in place.
        tokenizer: The model's.

    Attributes:
        layout: How its batches are laid out.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.layout: Layout = prepare(model)
        self.__name__ = "reward_model"  # what the metric of this reward is called

    @classmethod
    def load(cls, source: str | Path, *, dtype: str | torch.dtype = "auto") -> RewardModel:
        """Loads the reward model of a run or of a folder.

        Args:
            source: A run folder of `fastalign reward`, or a folder with a saved reward model.
            dtype: Of the weights; "auto" takes the saved one.

        Raises:
            ModelError: The folder holds no reward model.
        """
        folder = model_folder(source)
        model: Any = load_reward_model(folder, dtype=dtype)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(folder))

    @torch.no_grad()
    def score(self, rows: Dataset) -> list[list[float]]:
        """The score of every completion of tokenised rows.

        Args:
            rows: With `prompt_ids` and `completion_ids`.

        Returns:
            One list per row, with one score per completion.

        Raises:
            DataError: A row is longer than the model has positions.
        """
        check_fit(rows, self.model)
        scores: list[list[float]] = [[]] * len(rows)
        for batch in batch_rows(rows, range(len(rows))):
            some = [rows[i] for i in batch]
            packed = lay_out(some, self.layout, fill_token(self.tokenizer)).to(self.model.device)
            values = iter(self.model(packed=packed).rewards.tolist())
            for i, row in zip(batch, some, strict=True):
                scores[i] = [next(values) for _ in row["completion_ids"]]
        return scores

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """The score of each completion.

        Args:
            prompts: Texts, or chats as lists of messages.
            completions: The answers to them, in the same form.
            columns: Not read.

        Returns:
            One score per completion; None for an empty one, which has no last token of its own.

        Raises:
            InputError: There are not as many completions as prompts.
        """
        if len(prompts) != len(completions):
            raise InputError(f"There are {len(prompts)} prompts and {len(completions)} completions; pass one of each")
        filled = [i for i, completion in enumerate(completions) if _text(completion).strip()]
        scores: list[float | None] = [None] * len(completions)
        if filled:
            rows = [{"prompt": prompts[i], "completion": completions[i]} for i in filled]
            tokens, _ = tokenize(rows, self.tokenizer, wanted="completions", allow_empty_prompt=True)
            for i, (score,) in zip(filled, self.score(tokens), strict=True):
                scores[i] = score
        return scores


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(str(turn.get("content") or "") for turn in completion)
