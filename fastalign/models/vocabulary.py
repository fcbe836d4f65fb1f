"""Compares the vocabularies of tokenizers: distillation and comparisons need the same number for every token."""

from __future__ import annotations

import hashlib
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastalign.errors import ModelError


def check_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, names: tuple[str, str] = ("student", "teacher")
) -> None:
    """Checks that both tokenizers give every token the same number.

    Args:
        student: one tokenizer.
        teacher: the other one.
        names: what the error calls the two models.

    Raises:
        ModelError: they differ; the error names the first token that does.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differ = [token for token in ours if ours[token] != theirs.get(token)] or [t for t in theirs if t not in ours]
    token = differ[0]
    raise ModelError(
        f"The {names[0]} and the {names[1]} have different tokenizers: {len(differ):,} of {len(ours):,} tokens differ "
        f"({token!r} is {ours.get(token, 'unknown')} to the {names[0]} and {theirs.get(token, 'unknown')} to the "
        f"{names[1]}). Use models that share one."
    )


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of tokens that a model has embeddings for; it may be larger than its tokenizer's vocabulary."""
    weight: Any = model.get_input_embeddings().weight
    return weight.shape[0]


def fill_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills padded rows, where it is masked: the tokenizer's padding token, else EOS, else 0."""
    tokens: tuple[Any, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in tokens if token is not None), 0)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokens and their numbers, as a hexadecimal string."""
    return hashlib.blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16).hexdigest()
