"""Rows of one local file, or of dicts, as a table.

Nothing here reaches the network or writes a cache. That is why the files are not read by `datasets.load_dataset`, which
copies every file into a cache. Its errors also do not say which line of a file is damaged.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable
from pyarrow import parquet

from fastalign.errors import DataError

CHUNK_ROWS = 2000  # how many rows become a table at a time
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


def extension(path: Path) -> str:
    """What the name of a file says that it holds: ".jsonl", or ".jsonl.gz" if it is compressed. In lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] and suffixes[-1] in COMPRESSED else "".join(suffixes[-1:])


def read_file(path: Path) -> datasets.Dataset:
    """The rows of one file.

    Raises:
        DataError: the file is empty, damaged or of an unknown type. The error names the damaged line, counted from 1.
    """
    kind = extension(path)
    if kind not in EXTENSIONS:
        raise DataError(f"{path}: unknown extension {kind!r}, expected one of {', '.join(EXTENSIONS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: it needs at least one row.")
    if kind == ".parquet":
        return _read_parquet(path)
    try:
        read = partial(_READERS[kind.removesuffix(".gz").removesuffix(".zst")], path)
        return _from_stream(read, str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error!s:.200}).") from error


def _open(path: Path) -> io.BufferedReader:
    """The bytes of a file, without its compression. Arrow reads .zst without another package."""
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    return io.BufferedReader(cast(Any, pa.input_stream(path, compression=compression)))


def _read_jsonl(path: Path) -> Iterator[dict]:
    # Read as bytes: a str would also be split at the line separators that JSON strings may hold.
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_json(line, f"{path}, line {number}", "mend or delete this line", dict)


def _read_json(path: Path) -> list[dict]:
    remedy = (
        "the file must hold one list of objects, or one object with such a list in it (if it has one object per line, "
        "name it .jsonl)"
    )
    with _open(path) as file:
        value = _parse_json(file.read(), str(path), remedy, (list, dict))
    if isinstance(value, list):
        return value
    lists = [name for name, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if len(lists) != 1:
        found = f"lists of objects under {', '.join(lists)}" if lists else f"no such list under {', '.join(value)}"
        raise DataError(f"{path}: expected one list of objects, found {found:.200}: {remedy}.")
    rows = value[lists[0]]
    if all(isinstance(row, dict) and isinstance(row.get("row"), dict) for row in rows):
        rows = [row["row"] for row in rows]  # as the hub's server writes them, each with its number
    return rows


def _parse_json(text: bytes, where: str, remedy: str, expected: type | tuple[type, ...]):
    """The JSON value in a text, which must be of the type expected; DataError with the place and a remedy otherwise."""
    try:  # utf-8-sig: some editors put a byte order mark at the head of a file
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 (byte {error.start + 1}): save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:  # ValueError: bad syntax, or an integer too long to read
        raise DataError(f"{where}: not valid JSON ({error}): {remedy}.") from error
    if not isinstance(value, expected):
        kind = "an object" if expected is dict else "a list or an object"
        raise DataError(f"{where}: expected {kind}, found {type(value).__name__}: {remedy}.")
    return value


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[dict]:
    # The default limit refuses cells of more than 128 KiB. It is a setting of the process, so it is reset below.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    names = {",": "commas", "\t": "tabs"}
    reader: Any = None
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise DataError(f"{path} names the column {twice[0]!r} twice: rename one of them.")
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells where the header names {len(header)} "
                        f"columns: put quotes around cells that hold {names[delimiter]} or line breaks."
                    )
                if cells:
                    yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}): mend this line.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 ({error.reason}): save the file as UTF-8.") from error
    finally:
        csv.field_size_limit(limit)


# The names of files that can be read, without a compression behind them.
_READERS = {
    ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
}  # fmt: skip
EXTENSIONS = (*_READERS, ".parquet", *(kind + end for kind in _READERS for end in COMPRESSED))


def _read_parquet(path: Path) -> datasets.Dataset:
    try:
        rows = datasets.Dataset(InMemoryTable(parquet.read_table(path)))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error!s:.200}): write it again.") from error
    if not len(rows):
        raise DataError(f"{path} holds no rows: it needs at least one.")
    return rows


def _from_stream(read: Callable[[], Iterable[dict]], where: str) -> datasets.Dataset:
    """What `from_dicts` makes of the dicts that `read()` yields, in less memory: Arrow takes a third of Python's.

    Some thousand rows at a time become a table. If these tables do not fit together, all rows become one table at once,
    as only then it is known which columns hold values of several types.
    """
    rows, tables = iter(read()), []
    while some := list(islice(rows, CHUNK_ROWS)):
        if not tables and len(some) < CHUNK_ROWS:
            return from_dicts(some, where)
        try:
            tables.append(from_dicts(some, where))
        except DataError:  # says which row it is, counted from the first of these
            return from_dicts(list(read()), where)
    joined = _concatenated(tables)
    return from_dicts(list(read()), where) if joined is None else joined


def _concatenated(tables: list[datasets.Dataset]) -> datasets.Dataset | None:
    """Tables of rows of one file as one; None if they have other types, and one table of all rows might have others."""
    if not tables:
        return None
    if all(table.features == tables[0].features for table in tables):
        return datasets.concatenate_datasets(tables)
    seen: dict = {}
    if any(_holds_json(table.features) for table in tables):
        return None
    for table in tables:
        for name, feature in table.features.items():
            if not _fits(seen.setdefault(name, feature), feature):
                return None
            if _is_null(seen[name]):
                seen[name] = feature
    try:  # a column or a key that is null, or is not there, in some of the tables
        plain = [table.data.table.replace_schema_metadata(None) for table in tables]
        return datasets.Dataset(InMemoryTable(pa.concat_tables(plain, promote_options="permissive")))
    except pa.ArrowException:
        return None


def _fits(one: Any, other: Any) -> bool:
    """Whether values of two types would have one of both, and no third type, in a table of all of them."""
    if isinstance(one, datasets.List) and isinstance(other, datasets.List):
        return _fits(one.feature, other.feature)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_fits(one[key], other[key]) for key in one)
    if isinstance(one, datasets.Value) and isinstance(other, datasets.Value):
        return one == other or _is_null(one) or _is_null(other) or {one.dtype, other.dtype} == {"int64", "float64"}
    return _is_null(one) or _is_null(other)


def _is_null(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype == "null"


def _holds_json(feature: Any) -> bool:
    return "Json" in repr(feature)


def from_dicts(rows: list, where: str) -> datasets.Dataset:
    """A data set of some dicts; a field that a row lacks is null there.

    Args:
        rows: the dicts.
        where: what errors call the rows.

    Raises:
        DataError: a row is no dict, there are no rows, or a value fits into no table. The error names the row.
    """
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{where}, row {number}: expected a dict, found {type(row).__name__}.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise DataError(f"{where} holds no rows with any fields: it needs at least one.")
    columns = {name: [_as_cell(name, row.get(name)) for row in rows] for name in names}
    try:
        if cut := sorted(key for key in _keys(rows) if isinstance(key, str) and "\0" in key):
            raise DataError(f"the name {cut[0]!r} holds a zero character, at which Arrow would cut it")
        return datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
    except DataError as error:
        raise DataError(f"{where}: {error}: rename it.") from None
    except Exception as error:  # Arrow and its converters raise many kinds of errors for hostile values
        raise DataError(f"{where}: {_explain_columns(columns, error)}") from error


def _keys(value: dict | list) -> set:
    """The keys of all dicts in a value, at any depth."""
    found: set = set()
    if isinstance(value, dict):
        found.update(value)
        value = list(value.values())
    for inner in value:
        if isinstance(inner, (dict, list)):
            found |= _keys(inner)
    return found


def _as_cell(name: str, value):
    """A value as it goes into the table: what a tool is called with and how it is described becomes JSON text.

    Arrow would give all of them the same keys, with nulls that could not be told from those that somebody wrote.
    """
    if name in ("tools", "chat_template_kwargs"):
        return _as_json(value)
    if isinstance(value, list) and any(isinstance(turn, dict) and turn.get("tool_calls") for turn in value):
        return [_with_json_arguments(turn) for turn in value]
    return value


def _with_json_arguments(turn):
    if not isinstance(turn, dict) or not isinstance(turn.get("tool_calls"), list):
        return turn
    return turn | {"tool_calls": [_call_with_json(call) for call in turn["tool_calls"]]}


def _call_with_json(call):
    if not isinstance(call, dict):
        return call
    if isinstance(function := call.get("function"), dict):
        return call | {"function": _call_with_json(function)}
    return call | {"arguments": _as_json(call["arguments"])} if "arguments" in call else call


def _as_json(value):
    """The JSON text of a list or a dict; other values, and those that JSON cannot hold, as they are."""
    if not isinstance(value, (list, dict)):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return value


def _explain_columns(columns: dict[str, list], error: Exception) -> str:
    """Which value Arrow could not take: the first one, or of two that do not fit together the later one."""
    for name, values in columns.items():
        if _table_error(name, values):
            number, cause = _first_failing(name, values)
            return f"row {number} has a value in {name!r} that no table can hold ({cause!s:.120}): mend or remove it."
    return f"the rows do not fit into one table ({error!s:.200}): give each field one type."


def _first_failing(name: str, values: list) -> tuple[int, Exception]:
    """The row, counted from 1, up to which the values fit into no table, and why. Takes log2 of their number tables."""
    fits, fails = 0, len(values)  # how many values, from the first one, fit and fail
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if _table_error(name, values[:middle]):
            fails = middle
        else:
            fits = middle
    cause = _table_error(name, values[fails - 1 : fails]) or _table_error(name, values[:fails])
    return fails, cause or DataError("unknown")


def _table_error(name: str, values: list) -> Exception | None:
    try:
        datasets.Dataset.from_dict({name: values}, on_mixed_types="use_json")
    except Exception as error:  # as in `from_dicts`
        return error
    return None
