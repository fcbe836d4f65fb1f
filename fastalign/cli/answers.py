"""Answers of one model to prompts, as the commands `generate`, `chat` and `compare` make them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastalign.data.prompts import Prompt, encode_prompt
from fastalign.errors import DataError
from fastalign.evaluation.answers import Answers, answer
from fastalign.models.fit import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_prompts(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], args: argparse.Namespace, *, label: str
) -> Answers:
    """Answers to prompts, in their order.

    Args:
        model: on its device.
        tokenizer: the model's tokenizer.
        prompts: at least one.
        args: what `add_sampling` of `fastalign.cli.generate` declares, and `batch_size`.
        label: of the progress bar.

    Raises:
        DataError: a prompt leaves no room for an answer, or cannot be written by the chat template.
    """
    tokens = [encode_prompt(prompt, tokenizer, plain=args.plain) for prompt in prompts]
    positions = positions_of(model)
    room = positions - args.max_new_tokens
    for number, ids in enumerate(tokens, start=1):
        if not ids:
            raise DataError(f"Prompt {number} has no tokens: give some text.")
        if len(ids) > room:
            raise DataError(
                f"Prompt {number} has {len(ids):,} tokens, and the model has {positions:,.0f} positions for it "
                f"and {args.max_new_tokens} tokens of answer: shorten it, or lower --max-new-tokens."
            )
    return answer(
        model, tokenizer, tokens, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, label=label,
        temperature=args.temperature or None,
    )  # fmt: skip
