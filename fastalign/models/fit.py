"""Whether a tokenised data set fits a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from fastalign.data.token_table import TokenLengths, largest_token, lengths
from fastalign.errors import DataError, ModelError
from fastalign.models.adapters import causal_lm
from fastalign.models.quantization import has_quantized_embeddings
from fastalign.models.vocabulary import embedding_rows


def positions_of(model: Any) -> float:
    """How many tokens the model can attend to, prompt and answer together; infinity if it does not say.

    Args:
        model: a transformers model, or one inside wrappers.
    """
    return getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_fit(dataset: Dataset | Sequence[dict], model: PreTrainedModel) -> None:
    """Checks that the model knows every token of a data set and has a position for the longest row.

    Args:
        dataset: rows with `prompt_ids` and `completion_ids`.
        model: the transformers model itself.

    Raises:
        ModelError: a token's number is not below the number of embeddings.
        DataError: a prompt and its longest completion have more tokens than the model has positions.
    """
    vocab = embedding_rows(model)
    positions = positions_of(model)
    largest, found = largest_token(dataset), lengths(dataset)
    if largest >= vocab:
        when = " before the model is quantised" if has_quantized_embeddings(model) else ""
        raise ModelError(
            f"The tokenizer gives token {largest}, but the model knows {vocab}: use the model's own tokenizer, or "
            f"call model.resize_token_embeddings(len(tokenizer)){when}."
        )
    longest = int(found.longest().max(initial=0))
    if longest > positions:
        raise DataError(
            f"The longest row has {longest:,} tokens, but the model has {positions:,} positions: set "
            f"max_length={positions} with on_truncate='drop' or 'keep_end'."
        )
    _check_rope(found, model)


def _check_rope(found: TokenLengths, model: PreTrainedModel) -> None:
    """DataError where the rotary frequencies of a row would depend on the other rows of its batch.

    "longrope" has one set of frequencies for rows up to the length that the model was first trained for, and another
    set for longer ones. "dynamic" changes them with the length. transformers picks them by the longest row of the
    batch. So the rows of a batch must agree.
    """
    config: Any = model.config.get_text_config()
    for kind, limit in _changing_ropes(config):
        sizes = found.with_prompt()
        longer = int((sizes > limit).sum())
        if not longer or (kind == "longrope" and longer == len(sizes)):
            continue
        raise DataError(
            f"{longer:,} of {len(sizes):,} rows are longer than {limit:,} tokens, from where the model uses other "
            f"rotary frequencies ({kind}): in a batch with such a row the shorter ones would be scored wrongly. Set "
            f"max_length={limit} with on_truncate='drop' or 'keep_end'."
        )


def _changing_ropes(config: Any) -> list[tuple[str, int]]:
    """(kind, length from where it changes) of each rotary embedding whose frequencies depend on the length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    found = []
    for rope in per_layer_type:
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind == "longrope" or "dynamic" in kind:
            limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            found.append((kind, int(limit)))
    return found
