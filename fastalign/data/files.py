"""Rows of a data set, from a local file or from Python.

Nothing here reaches the network or writes a cache. That is why the files are not read by `datasets.load_dataset`, which
copies every file into a cache. Its errors also do not say which line of a file is damaged.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable
from pyarrow import parquet

from fastalign.errors import DataError

Rows = str | Path | list[dict] | datasets.Dataset  # what `load_rows` takes

MAX_DEPTH = 100  # levels of nesting that are searched for a value that holds itself


def load_rows(source: Rows) -> datasets.Dataset:
    """The rows of a local file, of a list, or of a data set.

    Args:
        source: the path of a file (.jsonl, .json, .csv, .parquet), a list of dicts, or a `datasets.Dataset`, which is
            returned as it is.

    Raises:
        DataError: the file is missing, empty, damaged or of an unknown type (the error names the damaged line, counted
            from 1); the list holds something other than dicts; or a value fits into no table.
    """
    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, datasets.DatasetDict):
        raise DataError(
            f"A DatasetDict holds several data sets: choose one of its splits {list(source)}, as in data['...']."
        )
    if isinstance(source, list):
        _refuse_circles(source)
        return _from_dicts(source, "The list of rows")
    if not isinstance(source, (str, Path)):
        raise DataError(
            f"Rows come from a file path, a list of dicts or a datasets.Dataset, not from {type(source).__name__}: "
            "build one with datasets.Dataset.from_list(list(rows))."
        )
    return _from_file(Path(source))


def _refuse_circles(rows: list) -> None:
    """Refuses a row that holds itself: no table can hold it, and Arrow's converters would never return."""
    for number, row in enumerate(rows, start=1):
        if _holds_itself(row, []):
            raise DataError(f"The list of rows, row {number}: a value holds itself. Remove that reference.")


def _holds_itself(value, outer: list) -> bool:
    if not isinstance(value, (dict, list, tuple)) or len(outer) > MAX_DEPTH:
        return False  # values nested as deeply as that are refused where they are read
    if any(value is other for other in outer):
        return True
    outer = [*outer, value]
    return any(_holds_itself(item, outer) for item in (value.values() if isinstance(value, dict) else value))


def _from_file(path: Path) -> datasets.Dataset:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": None}
    if not path.is_file():
        raise DataError(
            f"{path} is not a file: check the path. Only local files are read here; to use a data set of the Hugging "
            "Face hub, load it with datasets.load_dataset(...) and pass the result."
        )
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: unknown extension {path.suffix!r}, expected one of {', '.join(readers)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: it needs at least one row.")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    return _from_dicts(list(readers[path.suffix.lower()](path)), str(path))


def _read_jsonl(path: Path) -> Iterator[dict]:
    # Read as bytes: a str would also be split at the line separators that JSON strings may hold.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_json(line, f"{path}, line {number}", "mend or delete this line", dict)


def _read_json(path: Path) -> list[dict]:
    remedy = "the file must hold one list of objects (if it has one object per line, name it .jsonl)"
    return _parse_json(path.read_bytes(), str(path), remedy, list)


def _parse_json(text: bytes, where: str, remedy: str, expected: type):
    """The JSON value in a text, which must be of the type expected; DataError with the place and a remedy otherwise."""
    try:  # utf-8-sig: some editors put a byte order mark at the head of a file
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 (byte {error.start + 1}): save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:  # ValueError: bad syntax, or an integer too long to read
        raise DataError(f"{where}: not valid JSON ({error}): {remedy}.") from error
    if not isinstance(value, expected):
        kind = {dict: "an object", list: "a list"}[expected]
        raise DataError(f"{where}: expected {kind}, found {type(value).__name__}: {remedy}.")
    return value


def _read_csv(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        # The default limit refuses cells of more than 128 KiB. It is a setting of the whole process: it is put back.
        limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            header = next(reader, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise DataError(f"{path} names the column {twice[0]!r} twice: rename one of them.")
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells where the header names {len(header)} "
                        "columns: put quotes around cells that hold commas or line breaks."
                    )
                if cells:
                    yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}): mend this line.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not valid UTF-8 ({error.reason}): save the file as UTF-8.") from error
        finally:
            csv.field_size_limit(limit)


def _read_parquet(path: Path) -> datasets.Dataset:
    try:
        rows = datasets.Dataset(InMemoryTable(parquet.read_table(path)))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error!s:.200}): write it again.") from error
    if not len(rows):
        raise DataError(f"{path} holds no rows: it needs at least one.")
    return rows


def _from_dicts(rows: list, where: str) -> datasets.Dataset:
    """A data set of some dicts; a field that a row lacks is null there."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{where}, row {number}: expected a dict, found {type(row).__name__}.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise DataError(f"{where} holds no rows with any fields: it needs at least one.")
    columns = {name: [_as_cell(name, row.get(name)) for row in rows] for name in names}
    try:
        return datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
    except Exception as error:  # Arrow and its converters raise many kinds of errors for hostile values
        raise DataError(f"{where}: {_explain_columns(columns, error)}") from error


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
    except Exception as error:  # as in `_from_dicts`
        return error
    return None
