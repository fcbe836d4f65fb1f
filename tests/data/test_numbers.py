"""Numbers go with their rows: through dropped rows, rows of token ids, and bad values."""

from __future__ import annotations

from functools import partial

import pytest
from datasets import Dataset

from fastalign.data.numbers import with_numbers
from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError

ROWS = [
    {"prompt": "a", "chosen": "bb", "rejected": "c" * (40 if i in (1, 5, 6) else 1), "margin": 0.5 * i}
    for i in range(8)
]


def test_numbers_stay_with_their_rows(tokenizer):
    work = partial(tokenize, tokenizer=tokenizer, max_length=20, on_truncate="drop")
    found, _ = with_numbers(Dataset.from_list(ROWS), work, ["margin", "weight"])
    assert found["margin"][:] == [0.0, 1.0, 1.5, 2.0, 3.5] and "weight" not in found.column_names
    assert (
        with_numbers(Dataset.from_list(ROWS), partial(tokenize, tokenizer=tokenizer), ["margin"])[0]["margin"][-1]
        == 3.5
    )


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_no_finite_number_is_refused(tokenizer, value):
    rows = Dataset.from_list([*ROWS, {**ROWS[0], "margin": value}])
    with pytest.raises(DataError, match=r"'margin' is .* in row 9"):
        with_numbers(rows, partial(tokenize, tokenizer=tokenizer), ["margin"])
