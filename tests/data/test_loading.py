"""Rows from folders, several files, the hub's cache and Python objects."""

import json
import re

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from fastalign.data.loading import load_rows
from fastalign.errors import DataError

ROWS = [{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}]
MORE = [{"prompt": "c", "completion": "3"}, {"prompt": "d", "completion": "4"}, {"prompt": "e", "completion": "5"}]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(rows) -> str:
    return "".join(rows["prompt"])


def test_python_objects_of_rows(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    sources = [
        datasets.DatasetDict(train=table),
        table.to_iterable_dataset(),
        datasets.IterableDatasetDict(train=table.to_iterable_dataset()),
        pd.DataFrame(ROWS, index=[5, 6]),
        [write(tmp_path / "a.jsonl")],
        {"path": write(tmp_path / "a.jsonl")},
    ]
    for source in sources:
        assert load_rows(source).to_list() == ROWS, source
    assert load_rows(table) is table


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("someone/some-data", "check the path; for a data set of the Hugging Face hub write hub:someone/some-data."),
        ("data/some-data.jsonl", "data/some-data.jsonl is not a file or a folder: check the path."),
        ("./some-data.jsonl", "./some-data.jsonl is not a file or a folder: check the path."),
        ([], "holds no rows"),
        ([{"text": "a"}, "b"], "row 2: expected a dict, found str"),
        (3, "not from int"),
        (datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS), b=datasets.Dataset.from_list(ROWS)),
         "choose one of its splits ['a', 'b']"),
        ("hub:a/b/c", "must be hub:owner/name"),
    ],
)  # fmt: skip
def test_other_sources_are_refused(source, words):
    with pytest.raises(DataError, match=re.escape(words)):
        load_rows(source)


def test_a_row_that_holds_itself_is_refused():
    row = {"text": "a", "shared": [1]}
    row["also"] = row["shared"]  # held twice, but not by itself
    assert len(load_rows([row])) == 1
    row["inner"] = [row]
    with pytest.raises(DataError, match="row 2: a value holds itself"):
        load_rows([{"text": "a"}, row])


# Folders


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "train-00001.jsonl", MORE)
    write(tmp_path / "train-00000.jsonl")
    write(tmp_path / ".cache" / "old.jsonl", MORE)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert prompts(load_rows(str(tmp_path))) == "abcde"
    (tmp_path / "more").mkdir()
    parquet.write_table(pa.Table.from_pylist(MORE), tmp_path / "more" / "part.parquet")
    assert prompts(load_rows(tmp_path)) == "cdeabcde"


def test_a_folder_of_several_splits_is_refused(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "latest.jsonl")
    assert len(load_rows(tmp_path)) == 4
    write(tmp_path / "sub" / "my_test.jsonl")
    with pytest.raises(
        DataError, match=r"several splits, my_test\.jsonl and train\.jsonl: name the files of one split"
    ):
        load_rows(tmp_path)


def test_a_folder_without_rows_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no files of rows, which end with one of \.jsonl"):
        load_rows(tmp_path)


def test_what_datasets_saved_is_loaded(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "dict")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "two")
    assert load_rows(tmp_path / "one").to_list() == load_rows(tmp_path / "dict").to_list() == ROWS
    with pytest.raises(DataError, match="choose one of its splits"):
        load_rows(tmp_path / "two")
    assert load_rows(tmp_path / "two" / "test").to_list() == ROWS


# Several files


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [((1, 1), "abcde"), ((2, 1), "aabbcde"), ((1, 0.34), "abc"), ((1.5, 2), "aabccddee"), ((0.5, 0.67), "acd")],
)
def test_files_are_joined_by_their_weights(tmp_path, weights, wanted):
    paths = [write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", MORE)]
    source = [
        path if weight == 1 else {"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)
    ]
    assert prompts(load_rows(source)) == wanted


@pytest.mark.parametrize("weight", [0, -1, True, "2", float("nan"), 0.1])
def test_a_weight_that_makes_no_sense_is_refused(tmp_path, weight):
    with pytest.raises(DataError, match=r"The weight of .*a\.jsonl is "):
        load_rows([{"path": write(tmp_path / "a.jsonl"), "weight": weight}])


def test_files_of_other_columns_are_not_mixed(tmp_path):
    paths = [write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", [{"prompt": "a", "response": "b"}])]
    with pytest.raises(
        DataError, match=r"a\.jsonl and .*b\.jsonl have different columns \(completion, response are in"
    ):
        load_rows(paths)


def test_files_of_other_types_are_mixed(tmp_path):
    chat = [{"prompt": [{"role": "user", "content": "f"}], "completion": "6"}]
    rows = load_rows([write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", chat)])
    assert rows.to_list() == ROWS + chat


def test_rows_with_a_column_path_are_rows():
    rows = [{"path": "a", "text": "b"}]
    assert load_rows(rows).to_list() == rows


# The hub, here a folder of the same name, which `datasets` takes first


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner" / "name" / "train.jsonl")
    assert load_rows("hub:owner/name").to_list() == load_rows("hub:owner/name:train").to_list() == ROWS
    with pytest.raises(DataError, match=r"hub:owner/name:nothing: the data set cannot be loaded \("):
        load_rows("hub:owner/name:nothing")
    write(tmp_path / "owner" / "two" / "train.jsonl")
    write(tmp_path / "owner" / "two" / "test.jsonl", MORE)
    with pytest.raises(DataError, match=r"splits \['train', 'test'\], as in hub:owner/two:SPLIT"):
        load_rows("hub:owner/two")
    assert load_rows("hub:owner/two:test").to_list() == MORE


# Columns


def test_columns_are_named_by_hand():
    rows = [{"q": "a", "a": "1", "prompt": "system"}]
    named = load_rows(rows, {"prompt": "q", "completion": "a"})
    assert named.to_list() == [{"prompt": "a", "completion": "1", "prompt (not used)": "system"}]
    swapped = load_rows([{"prompt": "1", "completion": "a"}], {"prompt": "completion", "completion": "prompt"})
    assert swapped.to_list() == [{"completion": "1", "prompt": "a"}]
    with pytest.raises(DataError, match="columns names 'x' for 'prompt', and the data set has q, a, prompt"):
        load_rows(rows, {"prompt": "x"})
    with pytest.raises(DataError, match="names one column twice"):
        load_rows(rows, {"prompt": "q", "completion": "q"})
