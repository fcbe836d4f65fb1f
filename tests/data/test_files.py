"""Rows from files, lists and data sets, and what is said of those that are damaged."""

import gzip
import json

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from fastalign.data import files
from fastalign.data.files import from_dicts, read_file
from fastalign.data.loading import load_rows
from fastalign.errors import DataError


def write(tmp_path, name, content: bytes | str):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def gzipped(data: bytes) -> bytes:
    """Without the time, which would be a part of the tests' names and differ between pytest's processes."""
    return gzip.compress(data, mtime=0)


ROWS = [{"prompt": "a, b", "completion": 'say "hi"\n'}, {"prompt": "ü\u2028", "completion": "2"}]


def test_each_file_type_gives_the_same_rows(tmp_path):
    jsonl = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
    paths = [
        write(tmp_path, "a.jsonl", jsonl),
        write(tmp_path, "a.JSON", json.dumps(ROWS)),
        write(tmp_path, "a.csv", 'prompt,completion\n"a, b","say ""hi""\n"\n\nü\u2028,2\n'),
    ]
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in [*paths, str(tmp_path / "a.parquet"), ROWS]:
        assert load_rows(path).to_list() == ROWS, path


def test_a_dataset_is_returned_as_it_is():
    rows = datasets.Dataset.from_list(ROWS)
    assert load_rows(rows) is rows


def test_a_field_of_a_later_row_is_kept():
    assert load_rows([{"text": "a"}, {"text": "b", "note": "c"}]).to_list()[1] == {"text": "b", "note": "c"}


def test_a_cell_over_128_kib_is_read(tmp_path):
    assert len(load_rows(write(tmp_path, "a.csv", "text\n" + "x" * 200_000))[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"text": "a"}\n'), ("a.json", '[{"text": "a"}]'), ("a.csv", "text\na\n")],
)
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, name, content):
    path = write(tmp_path, name, b"\xef\xbb\xbf" + content.encode())
    assert load_rows(path).to_list() == [{"text": "a"}]


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", GOOD + b"\n" + b'{"text": "b"\n' + GOOD, "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl, line 2: not valid UTF-8 (byte 11): save the file as UTF-8"),
        ("a.jsonl", GOOD + b"[1]\n", "a.jsonl, line 2: expected an object, found list"),
        ("a.jsonl", GOOD + b'{"id": ' + b"1" * 5000 + b"}", "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", GOOD + b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl, line 1: not valid UTF-8"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}', "row 2 has a value in 'text' that no table can hold"),
        ("a.jsonl", GOOD + b'{"id": 1' + b"0" * 30 + b"}", "row 2 has a value in 'id' that no table can hold"),
        ("a.jsonl", b"\n\n", "a.jsonl holds no rows"),
        ("a.json", GOOD * 2, "if it has one object per line, name it .jsonl"),
        ("a.json", b'{"data": []}', "a.json: expected one list of objects, found no such list under data"),
        ("a.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "found lists of objects under a, b"),
        ("a.json", b"3", "a.json: expected a list or an object, found int"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json, row 2: expected a dict, found int"),
        ("a.csv", b"text,label\na,1\nb\n", "a.csv, line 3: 1 cells where the header names 2 columns"),
        ("a.csv", b'text\n"a" b\n', "a.csv, line 2: not valid CSV"),
        ("a.csv", b"text\n\xff\n", "a.csv: not valid UTF-8"),
        ("a.csv", b"text\n", "a.csv holds no rows"),
        ("a.csv", b"text,text\na,b\n", "a.csv names the column 'text' twice"),
        ("a.parquet", b"PAR1 not really", "a.parquet: not a readable Parquet file"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.tsv", b"text\tlabel\na\t1\nb\n", "put quotes around cells that hold tabs"),
        ("a.jsonl.gz", GOOD, "a.jsonl.gz cannot be read"),
        ("a.jsonl.gz", gzipped(GOOD * 99)[:-9], "a.jsonl.gz cannot be read"),
        ("a.csv.zst", b"text\na\n", "a.csv.zst cannot be read"),
        ("a.jsonl.gz", gzipped(GOOD + b"{"), "a.jsonl.gz, line 2: not valid JSON"),
        ("a.gz", b"x", "unknown extension '.gz'"),
        ("a.txt", b"x", "unknown extension '.txt', expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(tmp_path, name, content, words):
    with pytest.raises(DataError) as error:
        read_file(write(tmp_path, name, content))
    assert words in str(error.value)
    assert len(str(error.value)) < 600


def test_compressed_files_are_read(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = b'prompt\tcompletion\n"a, b"\t"say ""hi""\n"\n' + "\u00fc\u2028\t2\n".encode()
    zstd = pa.Codec("zstd")
    for name, content in (
        ("a.jsonl.gz", gzipped(lines)),
        ("a.ndjson.zst", zstd.compress(lines).to_pybytes()),
        ("b.jsonl.zst", b"".join(zstd.compress(line + b"\n").to_pybytes() for line in lines.splitlines())),
        ("a.json.GZ", gzipped(json.dumps(ROWS).encode())),
        ("a.tsv", b"\xef\xbb\xbf" + table),
        ("a.tsv.gz", gzipped(table)),
        ("of.a.project.jsonl", lines),
    ):
        assert read_file(write(tmp_path, name, content)).to_list() == ROWS, name


def test_an_object_may_hold_the_rows(tmp_path):
    for name, value in (
        ("a.json", {"version": "1.0", "tags": ["x"], "data": ROWS}),
        ("b.json", {"features": [], "rows": [{"row_idx": n, "row": row} for n, row in enumerate(ROWS)]}),
    ):
        assert read_file(write(tmp_path, name, json.dumps(value))).to_list() == ROWS


def test_a_bad_value_in_a_late_row_is_found_with_few_tables(monkeypatch):
    made = []
    make = datasets.Dataset.from_dict
    monkeypatch.setattr(datasets.Dataset, "from_dict", lambda *args, **kw: made.append(1) or make(*args, **kw))
    rows = [{"text": "a", "meta": 1, "more": [{"x": 1}]} for _ in range(3000)]
    rows[2990] = {"text": "a", "meta": 2**70, "more": None}
    with pytest.raises(DataError, match="row 2991 has a value in 'meta' that no table can hold"):
        from_dicts(rows, "The rows")
    assert len(made) < 20


@pytest.mark.parametrize(
    "row",
    [{"prompt\0": "a", "prompt": "b"}, {"prompt": {"a\0b": 1, "a": 2}}, {"prompt": [[{"a\0": "x"}]]}],
)
def test_a_name_that_arrow_would_cut_is_refused(row, tmp_path):
    """Arrow ends a name at its first zero character: two fields would become one name, or one another field's."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    for source in ([row], tmp_path / "rows.jsonl"):
        with pytest.raises(DataError, match=r"the name '.*\\x00.*' holds a zero character.*: rename it"):
            load_rows(source)


# Rows of several tables: a column that is null at first, keys that come later, numbers of two kinds, mixed types.
LATER = {
    "the same": [{"a": "x", "n": 1}] * 7,
    "null": [{"a": None, "b": "x"}] * 3 + [{"a": "y", "b": None}] * 3,
    "missing": [{"a": "x"}] * 3 + [{"b": "y"}] * 3,
    "keys": [{"m": [{"role": "user"}]}] * 3 + [{"m": [{"content": "x", "role": "user", "extra": {"k": 1}}]}] * 3,
    "numbers": [{"a": 1}] * 3 + [{"a": 2.5}] * 3,
    "mixed": [{"a": 1}] * 3 + [{"a": "x"}] * 3,
    "mixed within": [{"a": 1}, {"a": "x"}, {"a": 2}] + [{"a": "y"}] * 3,
    "nested": [{"a": [[1], []]}] * 3 + [{"a": [["x"]]}] * 3,
    "empty": [{"a": []}] * 3 + [{"a": [{"k": None}]}] * 3 + [{"a": [{"k": True}]}],
}


@pytest.mark.parametrize("case", LATER)
def test_rows_in_several_tables_are_those_of_one(case, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in LATER[case]))
    whole = read_file(path)
    monkeypatch.setattr(files, "CHUNK_ROWS", 3)
    parts = read_file(path)
    assert parts.to_list() == whole.to_list()
    assert parts.features == whole.features


def test_an_error_in_a_later_table_names_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_ROWS", 3)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x"}\n' * 5 + '{"a\\u0000": "x"}\n')
    with pytest.raises(DataError, match="zero character"):
        read_file(path)
    path.write_text('{"a": "x"}\n' * 5 + "{\n")
    with pytest.raises(DataError, match="line 6"):
        read_file(path)
