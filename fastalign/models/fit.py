"""Whether a tokenised data set fits a model."""

from __future__ import annotations

import math
from collections.abc import Iterable

from transformers import PreTrainedModel

from fastalign.errors import DataError, ModelError
from fastalign.models.quantization import has_quantized_embeddings
from fastalign.models.vocabulary import embedding_rows


def check_fit(dataset: Iterable[dict], model: PreTrainedModel) -> None:
    """Checks that the model knows every token of a data set and has a position for the longest row.

    Args:
        dataset: rows with `prompt_ids` and `completion_ids`.
        model: the transformers model itself.

    Raises:
        ModelError: a token's number is not below the number of embeddings.
        DataError: a prompt and its longest completion have more tokens than the model has positions.
    """
    vocab = embedding_rows(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    largest = max((max([*row["prompt_ids"], *map(max, row["completion_ids"])]) for row in dataset), default=0)
    if largest >= vocab:
        when = " before the model is quantised" if has_quantized_embeddings(model) else ""
        raise ModelError(
            f"The tokenizer gives token {largest}, but the model knows {vocab}: use the model's own tokenizer, or "
            f"call model.resize_token_embeddings(len(tokenizer)){when}."
        )
    longest = max((len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in dataset), default=0)
    if longest > positions:
        raise DataError(
            f"The longest row has {longest:,} tokens, but the model has {positions:,} positions: set "
            f"max_length={positions} with on_truncate='drop' or 'keep_end'."
        )
