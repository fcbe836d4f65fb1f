"""Keys of completions, under which what is computed from them is stored."""

from __future__ import annotations

from pathlib import Path

import datasets

from fastalign.data.keys import cache_folder, dataset_keys, row_keys, rows_fingerprint
from fastalign.files import KEY_BYTES

ROW = {"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5], [6]]}


def test_a_key_depends_on_prompt_completion_and_mask_alone():
    keys = row_keys(ROW)
    assert [len(key) for key in keys] == [KEY_BYTES, KEY_BYTES]
    assert row_keys({**ROW, "completion_mask": None, "label": True}) == keys
    assert row_keys({**ROW, "completion_ids": [[6], [4, 5]]}) == keys[::-1]


def test_keys_are_the_same_in_the_next_release():
    """Else every cache on a user's disk would be computed again without a word."""
    assert row_keys(ROW)[0].hex() == "eb09d3c5c87c571ce6663f13a29e401f"


def test_different_rows_have_different_keys():
    rows = [
        {"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5]]},
        {"prompt_ids": [1, 2], "completion_ids": [[3, 4, 5]]},  # the same tokens, divided elsewhere
        {"prompt_ids": [], "completion_ids": [[1, 2, 3, 4, 5]]},
        {"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5]], "completion_mask": [[0, 1]]},
        {"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5]], "completion_mask": [[1, 1]]},
        {"prompt_ids": [1, 2, 3], "completion_ids": [[5, 4]]},
    ]
    assert len({row_keys(row)[0] for row in rows}) == len(rows)


def test_the_cache_is_the_folder_given_or_the_users(monkeypatch, tmp_path):
    assert cache_folder(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "fastalign"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("") == Path.home() / ".cache" / "fastalign"


def test_a_fingerprint_is_of_the_values_alone(tmp_path):
    rows = [{**ROW, "label": bool(i % 2), "weight": 0.5 * i} for i in range(2500)]
    whole = datasets.Dataset.from_list(rows)
    found = rows_fingerprint(whole)
    pieces = datasets.concatenate_datasets([whole.select(range(7)), whole.select(range(7, 2500))])
    shuffled = whole.select(range(2499, -1, -1)).select(range(2499, -1, -1))
    whole.save_to_disk(tmp_path / "rows")
    for same in (pieces, shuffled, datasets.load_from_disk(tmp_path / "rows"), whole.add_column("x", [1] * 2500)):
        assert rows_fingerprint(same, leave_out=["x"]) == found
    assert len({found, rows_fingerprint(whole.select(range(2499))), rows_fingerprint(whole.select([1, 0]))}) == 3


def test_a_fingerprint_sees_each_change():
    rows = [
        ROW,
        {**ROW, "prompt_ids": [1, 2, 4]},
        {"prompt_ids": [1, 2], "completion_ids": [[3, 4, 5], [6]]},  # the same tokens, divided elsewhere
        {**ROW, "completion_ids": [[4], [5, 6]]},
        {**ROW, "label": True},
        {**ROW, "label": None},
    ]
    assert len({rows_fingerprint(datasets.Dataset.from_list([row])) for row in rows}) == len(rows)


def test_the_keys_of_a_data_set_are_those_of_its_rows():
    rows = [
        {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5]], "completion_mask": [[1], [0, 1]]},
        {"prompt_ids": [], "completion_ids": [[300_000]], "completion_mask": [[1]]},
    ]
    plain = [{name: row[name] for name in ("prompt_ids", "completion_ids")} for row in rows]
    some = [rows[0], {**rows[1], "completion_mask": None}]
    for given in (rows, plain, some):
        tokens = datasets.Dataset.from_list(given)
        assert dataset_keys(tokens) == [row_keys(row) for row in given]
        assert dataset_keys(tokens.select([1, 0])) == [row_keys(row) for row in given[::-1]]
