"""Numbers go with their rows: through dropped rows, rows of token ids, and bad values."""

from __future__ import annotations

import pytest

from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError

ROWS = [{"prompt": "a", "chosen": "bb", "rejected": "c" * (40 if i == 1 else 1), "margin": 0.5 * i} for i in range(4)]


def test_numbers_stay_with_their_rows(tokenizer):
    found, _ = tokenize(ROWS, tokenizer, numbers=("margin", "weight"), max_length=20, on_truncate="drop")
    assert found["margin"][:] == [0.0, 1.0, 1.5] and "weight" not in found.column_names
    again, _ = tokenize(found, tokenizer, numbers=("margin",))
    assert again["margin"][:] == [0.0, 1.0, 1.5]
    assert "margin" not in tokenize(ROWS, tokenizer)[0].column_names


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_no_finite_number_is_an_invalid_row(tokenizer, value):
    rows = [*ROWS, {**ROWS[0], "margin": value}]
    with pytest.raises(DataError, match=r"1 with no number \(row 5"):
        tokenize(rows, tokenizer, numbers=("margin",))
    assert len(tokenize(rows, tokenizer, numbers=("margin",), on_invalid="drop")[0]) == 4
