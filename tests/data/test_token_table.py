"""Tables of tokens: the same lists that went in, and lengths without lists."""

from collections import Counter

import pyarrow as pa

from fastalign.data.encoding import Tokens
from fastalign.data.token_table import SCHEMA, dataset_of, largest_token, lengths, scored, table_of, with_masks

ROWS = [
    (Tokens([1, 2], [[3], [4, 5]], [[1], [0, 1]], Counter()), None),
    (Tokens([], [[6, 7, 8], [9]], [[1, 0, 1], [1]], Counter()), None),
]
LISTS = [
    {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5]], "completion_mask": [[1], [0, 1]], "label": None},
    {"prompt_ids": [], "completion_ids": [[6, 7, 8], [9]], "completion_mask": [[1, 0, 1], [1]], "label": None},
]


def test_a_table_holds_the_rows():
    assert table_of(ROWS, masked=True).to_pylist() == LISTS
    assert table_of([], masked=False).schema == SCHEMA


def test_masks_of_ones_are_written_where_masks_are_null():
    table = pa.concat_tables([table_of(ROWS, masked=False), table_of(ROWS, masked=True)])
    masks = with_masks(table)["completion_mask"].to_pylist()
    assert masks == [[[1], [1, 1]], [[1, 1, 1], [1]], *(row["completion_mask"] for row in LISTS)]


def test_lengths_and_scored_tokens_of_slices_and_selections():
    tokens = dataset_of([table_of(ROWS, masked=True)] * 2, ["prompt_ids", "completion_ids", "completion_mask"])
    for rows, wanted in ((tokens, [0, 1, 0, 1]), (tokens.select([3, 0]), [1, 0]), (tokens.select(range(1, 3)), [1, 0])):
        found, lists = lengths(rows), [ROWS[n][0] for n in wanted]
        assert found.prompts.tolist() == [len(one.prompt) for one in lists]
        assert found.completions.tolist() == [len(ids) for one in lists for ids in one.completions]
        assert found.per_row().tolist() == [len(one.prompt) + sum(map(len, one.completions)) for one in lists]
        assert found.longest().tolist() == [one.length for one in lists]
        assert found.with_prompt().tolist() == [len(one.prompt) + len(c) for one in lists for c in one.completions]
        assert [part.tolist() for part in found] == [part.tolist() for part in lengths(rows.to_list())]
        assert scored(rows) == sum(sum(map(sum, one.masks)) for one in lists)
        assert largest_token(rows) == largest_token(rows.to_list()) == 9
    assert [part.shape for part in lengths(tokens.select([]))] == [(0,)] * 3
    assert lengths(tokens.select([])).longest().shape == (0,) and largest_token(tokens.select([])) == 0


def test_rows_may_have_different_numbers_of_completions():
    found = lengths([{"prompt_ids": [1], "completion_ids": [[1, 2]]}, {"prompt_ids": [], "completion_ids": [[1], [2]]}])
    assert found.per_row().tolist() == [3, 2] and found.per_row(share_prompts=False).tolist() == [3, 2]
