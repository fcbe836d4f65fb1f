"""Whether a data set fits a model."""

import pytest

from fastalign.errors import DataError, ModelError
from fastalign.models.fit import check_fit, positions_of


def row(prompt, *completions):
    return {"prompt_ids": prompt, "completion_ids": list(completions)}


def test_the_last_token_and_the_last_position_fit(tiny_llama):
    model = tiny_llama(vocab_size=100)
    assert positions_of(model) == 256
    check_fit([row([1] * 200, [99] * 56, [2])], model)
    check_fit([], model)
    with pytest.raises(ModelError, match=r"gives token 100, but the model knows 100: .*resize_token_embeddings"):
        check_fit([row([1], [2, 100])], model)
    with pytest.raises(DataError, match=r"longest row has 257 tokens, but the model has 256 positions: set max_length"):
        check_fit([row([1] * 200, [2], [2] * 57)], model)


@pytest.mark.parametrize(
    ("kind", "sizes", "refused"),
    [
        ("longrope", (5, 32), False),
        ("longrope", (5, 33), True),
        ("longrope", (33, 40), False),
        ("dynamic", (5, 64), False),
        ("default", (5, 33), False),
    ],
)
def test_rows_with_other_rotary_frequencies_are_not_mixed(tiny_llama, kind, sizes, refused):
    """transformers picks the frequencies of a whole batch by its longest row."""
    model = tiny_llama()
    model.config.max_position_embeddings = 64
    rope = {"rope_type": kind, "original_max_position_embeddings": 64 if kind == "dynamic" else 32}
    model.config.rope_parameters = {**model.config.rope_parameters, **rope}
    rows = [row([1, 1], [2] * (size - 2)) for size in sizes]
    if not refused:
        check_fit(rows, model)
        return
    with pytest.raises(DataError, match=r"1 of 2 rows are longer than 32 tokens.*\(longrope\).*max_length=32"):
        check_fit(rows, model)
