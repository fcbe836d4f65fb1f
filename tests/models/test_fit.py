"""Whether a data set fits a model."""

import pytest

from fastalign.errors import DataError, ModelError
from fastalign.models.fit import check_fit


def row(prompt, *completions):
    return {"prompt_ids": prompt, "completion_ids": list(completions)}


def test_the_last_token_and_the_last_position_fit(tiny_llama):
    model = tiny_llama(vocab_size=100)  # of 256 positions
    check_fit([row([1] * 200, [99] * 56, [2])], model)
    check_fit([], model)
    with pytest.raises(ModelError, match=r"gives token 100, but the model knows 100: .*resize_token_embeddings"):
        check_fit([row([1], [2, 100])], model)
    with pytest.raises(DataError, match=r"longest row has 257 tokens, but the model has 256 positions: set max_length"):
        check_fit([row([1] * 200, [2], [2] * 57)], model)
