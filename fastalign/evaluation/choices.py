"""Multiple choice: the log-probability of each option as the continuation of its prompt.

The prompt is laid out once for all its options, and only the tokens of the options reach the output layer, whose logits
are never stored. The numbers are those of scoring each option by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastalign.data.batching import batches_within, token_count
from fastalign.data.chat import Example
from fastalign.data.encoding import encode_examples, special_prefix
from fastalign.data.messages import RowProblem
from fastalign.data.packing import Layout, lay_out
from fastalign.data.template import Template
from fastalign.errors import DataError
from fastalign.evaluation.suite import Item
from fastalign.models.adapters import causal_lm
from fastalign.models.fit import positions_of
from fastalign.models.modes import evaluation_mode
from fastalign.models.vocabulary import fill_token

_EAST_ASIAN = r"[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]"  # is written without spaces between words


class ChoiceScores(NamedTuple):
    """What a model says about the k options of one item.

    Attributes:
        logprobs: (k,) float64, the sum of the log-probabilities of each option's tokens, in nats.
        tokens: (k,) int64, the number of its tokens.
    """

    logprobs: np.ndarray
    tokens: np.ndarray


def score_choices(
    model: Any, tokenizer: PreTrainedTokenizerBase, layout: Layout, items: Sequence[Item], *, progress: bool = False
) -> list[ChoiceScores]:
    """The log-probabilities of every item's options.

    Args:
        model: A model that `fastalign.models.prepare` has seen.
        tokenizer: The model's tokenizer.
        layout: What `prepare` returned.
        items: Items with `choices`.
        progress: Whether to show a progress bar.

    Returns:
        One entry per item, in their order.

    Raises:
        DataError: Two options of an item have the same tokens, an option has none, the item is longer than the model
            has positions, or the chat template refuses the turns.
    """
    positions = positions_of(model)
    rows = encode_choices(items, tokenizer)
    for item, row in zip(items, rows, strict=True):
        _check(item, row, positions)
    # Items of similar length share a batch, because a model that cannot take packed rows pads them to the longest.
    order = sorted(range(len(rows)), key=lambda i: token_count(rows[i]))
    batches = list(batches_within(order, lambda i: token_count(rows[i])))
    found: dict[int, ChoiceScores] = {}
    with torch.no_grad(), evaluation_mode(model):
        for batch in tqdm(batches, desc="choices", unit="batch", leave=False, disable=not progress):
            packed = lay_out([rows[i] for i in batch], layout, fill_token(tokenizer)).to(causal_lm(model).device)
            logprobs = model(packed=packed).logprobs.double().cpu().numpy()  # (S,)
            offsets = packed.cu_seqlens.cpu().numpy()  # (C + 1,)
            sums, counts = np.add.reduceat(logprobs, offsets[:-1]), np.diff(offsets)  # (C,), no option is empty
            at = 0
            for i in batch:
                options = slice(at, at + len(items[i].choices))
                found[i] = ChoiceScores(sums[options], counts[options])
                at = options.stop
    return [found[i] for i in range(len(items))]


def encode_choices(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Rows of `prompt_ids` and `completion_ids` for `fastalign.data.packing.lay_out`, one per item.

    A prompt of text is continued as it stands, without chat template. Turns of a chat are written by the template, and
    an option is then the beginning of the assistant's answer.

    Args:
        items: Items with `choices`.
        tokenizer: The model's tokenizer.

    Raises:
        DataError: The tokenizer has no chat template, or the template refuses the turns.
    """
    examples = [_example(item, tokenizer) for item in items]
    prefix = special_prefix(tokenizer)
    rows = []
    for tokens in encode_examples(examples, tokenizer):
        has_prefix = not prefix or tokens.prompt[: len(prefix)] == prefix
        prompt = tokens.prompt if has_prefix else [*prefix, *tokens.prompt]
        rows.append({"prompt_ids": prompt, "completion_ids": tokens.completions})
    return rows


def _example(item: Item, tokenizer: PreTrainedTokenizerBase) -> Example:
    spans: list = [None] * len(item.choices)
    if isinstance(item.prompt, str):
        # White space before an option belongs to its first token in most vocabularies, so it goes with the option.
        prompt = item.prompt.rstrip()
        space = item.prompt[len(prompt) :]
        return Example(prompt, [_joined(prompt, space, text) for text in item.choices], spans)
    if not tokenizer.chat_template:
        raise DataError(f"Item {item.id} holds chat messages, but the tokenizer has no chat template: give a prompt.")
    try:
        return Example(Template(tokenizer)(item.prompt, True), list(item.choices), spans)
    except RowProblem as problem:
        raise DataError(f"Item {item.id} cannot be used: {problem.detail}.") from problem


def _joined(prompt: str, space: str, option: str) -> str:
    """An option as it continues a prompt: behind one space, unless there is white space already or none is written."""
    if space or option[:1].isspace() or re.match(_EAST_ASIAN, prompt[-1:]) or re.match(_EAST_ASIAN, option):
        return space + option
    return " " + option


def _check(item: Item, row: dict[str, Any], positions: float) -> None:
    options = [tuple(ids) for ids in row["completion_ids"]]
    if not all(options):
        raise DataError(f"Item {item.id} has an option without tokens: change the option.")
    if len(set(options)) < len(options):
        raise DataError(f"Item {item.id} has two options of the same tokens, which the model cannot tell apart.")
    if not row["prompt_ids"]:
        raise DataError(f"Item {item.id} has a prompt without tokens, so nothing predicts its options: give some text.")
    length = len(row["prompt_ids"]) + max(map(len, options))
    if length > positions:
        raise DataError(
            f"Item {item.id} has {length:,} tokens with its longest option, and the model has {positions:,} positions: "
            "shorten it or leave it out."
        )
