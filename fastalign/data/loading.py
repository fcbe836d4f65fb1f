"""Rows of a data set, from wherever they are: files, folders, several files with weights, the hub, or Python.

Nothing here reaches the network, except for sources that are written `hub:owner/name`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np

from fastalign.data.files import EXTENSIONS, extension, from_dicts, read_file
from fastalign.errors import DataError

HUB = "hub:"
MAX_DEPTH = 100  # levels of nesting that are searched for a value that holds itself
_SPLIT = re.compile(r"(?:^|[^a-z])(train|test|validation|valid|val|dev|eval)(?:[^a-z]|$)", re.IGNORECASE)
_SPLITS: dict[str, str] = dict.fromkeys(("valid", "val", "dev", "eval"), "validation")  # names that mean the same
_NOT_ROWS = ("dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json")  # written by `datasets`


@dataclass(frozen=True)
class Source:
    """Rows that are not read yet. `load_rows` reads them.

    Attributes:
        where: what `load_rows` takes.
        columns: its `columns`.
    """

    where: Any
    columns: Mapping[str, str] | None = None


# What `load_rows` takes; further kinds of objects are described there.
Rows = str | Path | list | Mapping | datasets.Dataset | datasets.IterableDataset | Source


def load_rows(source: Any, columns: Mapping[str, str] | None = None) -> datasets.Dataset:
    """The rows of a file, of several files, of a data set of the hub, or of a Python object.

    Args:
        source: one of

            - the path of a file (.jsonl, .json, .csv, .tsv, .parquet; all but .parquet also with .gz or .zst behind)
            - the path of a folder of such files, or of one that `Dataset.save_to_disk` wrote
            - "hub:owner/name", with ":split" behind where there are several, or ":config:split"
            - a list of these, or of {"path": ..., "weight": ...}: every row is taken `weight` times (default 1). Of a
              part of the rows, as with a weight of 0.5, evenly spaced rows are taken
            - a list of dicts, a `datasets.Dataset`, `IterableDataset` (which is read to its end into memory), a
              `DatasetDict` of one split, or a pandas `DataFrame`
        columns: from a field, such as "prompt", to the column that holds it. A column of the field's name that is there
            already is then not read.

    Raises:
        DataError: a file is missing, empty, damaged or of an unknown type (the error names the damaged line, counted
            from 1); the list holds something other than dicts; a value fits into no table; or a column is missing.
    """
    if isinstance(source, Source):
        return load_rows(source.where, source.columns)
    rows = _rows(source)
    return _renamed(rows, columns) if columns else rows


def files_of(source: Any) -> list[tuple[Path, float]] | None:
    """The files that hold all that a source has, in order and with their weights; None for other sources.

    Raises:
        DataError: as for `load_rows`, for a folder whose files are of several splits.
    """
    items = source if isinstance(source, list) else [source]
    if not items or not all(map(_is_source, items)):
        return None
    found: list[tuple[Path, float]] = []
    for item in items:
        path, weight = Path(_name(item)).expanduser(), item.get("weight", 1) if isinstance(item, dict) else 1
        if path.is_file():
            found.append((path, weight))
        elif path.is_dir() and not _is_saved(path):
            found += [(file, weight) for file in _files_in(path)]
        else:
            return None
    return found


def of_each(rows: Any, work: Callable[[Any, str], Any]) -> Any:
    """What `work(rows, name)` returns for held-out rows; for several data sets by name a dict of what it returns.

    A dict with "path" is one source of rows, as `load_rows` takes it.
    """
    if rows is None:
        return None
    if isinstance(rows, dict) and "path" not in rows:
        return {name: work(value, f"eval {name}") for name, value in rows.items()}
    return work(rows, "eval")


def _rows(source: Any) -> datasets.Dataset:
    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return _rows(_only_split(source, "data['...']"))
    if isinstance(source, datasets.IterableDataset):
        return from_dicts(list(source), "The stream of rows")
    if isinstance(source, (str, Path)):
        return _from_path(str(source))
    if isinstance(source, dict) and "path" in source:
        source = [source]
    if isinstance(source, list) and source and all(map(_is_source, source)):
        return _joined([(_name(item), _weighted(item)) for item in source])
    if isinstance(source, list):
        _refuse_circles(source)
        return from_dicts(source, "The list of rows")
    if type(source).__module__.partition(".")[0] == "pandas":
        return datasets.Dataset.from_pandas(cast(Any, source), preserve_index=False)
    raise DataError(
        f"Rows come from a path, a list of dicts, a datasets.Dataset or a pandas.DataFrame, not from "
        f"{type(source).__name__}: build one with datasets.Dataset.from_list(list(rows))."
    )


def _only_split(splits: Any, how: str) -> Any:
    if len(splits) != 1:
        raise DataError(f"A DatasetDict holds several data sets: choose one of its splits {list(splits)}, as in {how}.")
    return next(iter(splits.values()))


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


# Paths


def _from_path(text: str) -> datasets.Dataset:
    if text.startswith(HUB):
        return _from_hub(text)
    path = Path(text).expanduser()
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return _from_folder(path)
    of_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) and extension(path) not in EXTENSIONS
    hint = f"; for a data set of the Hugging Face hub write {HUB}{text}" if of_hub else ""
    raise DataError(f"{text} is not a file or a folder: check the path{hint}.")


def _from_folder(folder: Path) -> datasets.Dataset:
    """All files of a folder in the order of their names, or what `save_to_disk` wrote."""
    if _is_saved(folder):
        saved = datasets.load_from_disk(str(folder))
        return _rows(saved) if isinstance(saved, datasets.Dataset) else _rows(_only_split(saved, f"{folder}/..."))
    return _joined([(str(path), read_file(path)) for path in _files_in(folder)])


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _files_in(folder: Path) -> list[Path]:
    """The files of rows in a folder, in the order of their names."""
    files = sorted(path for path in folder.rglob("*") if _is_data_file(path.relative_to(folder)) and path.is_file())
    if not files:
        raise DataError(f"{folder} holds no files of rows, which end with one of {', '.join(EXTENSIONS)}.")
    found: dict[str, Path] = {}
    for path in files:
        if match := _SPLIT.search(str(path.relative_to(folder))):
            found.setdefault(_SPLITS.get(match[1].lower(), match[1].lower()), path)
    if len(found) > 1:
        raise DataError(
            f"{folder} holds files of several splits, {' and '.join(path.name for path in [*found.values()][:2])}: "
            "name the files of one split in a list."
        )
    return files


def _is_data_file(path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return not hidden and path.name not in _NOT_ROWS and extension(path) in EXTENSIONS


def _from_hub(text: str) -> datasets.Dataset:
    name, _, rest = text.removeprefix(HUB).partition(":")
    config, _, split = rest.rpartition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"{text!r} must be {HUB}owner/name, {HUB}owner/name:split or {HUB}owner/name:config:split.")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or None)
    except Exception as error:  # the hub, its files and the network may raise anything
        raise DataError(f"{text}: the data set cannot be loaded ({' '.join(str(error).split())!s:.300}).") from error
    return _rows(loaded) if isinstance(loaded, datasets.Dataset) else _only_split(loaded, f"{HUB}{name}:SPLIT")


# Several sources


def _is_source(item: Any) -> bool:
    """Whether an item of a list is a source by itself. A row may have a column `path`, but not that alone."""
    return isinstance(item, (str, Path)) or (
        isinstance(item, dict) and "path" in item and {*item} <= {"path", "weight"}
    )


def _name(item: Any) -> str:
    return str(item["path"] if isinstance(item, dict) else item)


def _weighted(item: Any) -> datasets.Dataset:
    """The rows of one source, each `weight` times."""
    rows, weight = _from_path(_name(item)), item.get("weight", 1) if isinstance(item, dict) else 1
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1000:
        raise DataError(f"The weight of {_name(item)} is {weight!r}: it must be a number above 0, and at most 1000.")
    count = round(len(rows) * weight)
    if not count:
        raise DataError(f"The weight of {_name(item)} is {weight}: that leaves none of its {len(rows):,} rows.")
    if weight == 1:
        return rows
    return rows.select(np.minimum(np.arange(count) / weight, len(rows) - 1).astype(np.int64))


def _joined(parts: list[tuple[str, datasets.Dataset]]) -> datasets.Dataset:
    """One data set of several, which must have the same columns: otherwise some would be read, and others not."""
    first_name, first = parts[0]
    for name, rows in parts[1:]:
        if {*rows.column_names} != {*first.column_names}:
            only = sorted({*rows.column_names} ^ {*first.column_names})
            raise DataError(
                f"{first_name} and {name} have different columns ({', '.join(only)} are in one of them alone): give "
                "files of one layout. `fastalign data check FILE --out OTHER` converts a file."
            )
    if len(parts) == 1:
        return first
    plain = [rows.with_format(None) for _, rows in parts]
    try:
        return datasets.concatenate_datasets(plain)
    except (ValueError, TypeError):  # the same columns, but other types, such as strings in one and messages in another
        return from_dicts([row for rows in plain for row in rows], f"{first_name} and the files after it")


def _renamed(rows: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
    for field, column in columns.items():
        if column not in rows.column_names:
            raise DataError(
                f"columns names {column!r} for {field!r}, and the data set has {', '.join(rows.column_names)}."
            )
    if len({*columns.values()}) < len(columns):
        raise DataError(f"columns names one column twice: {dict(columns)}.")
    taken = [name for name in rows.column_names if name in columns and name not in columns.values()]
    rows = rows.rename_columns({name: f"{name} (not used)" for name in taken})
    return rows.rename_columns({column: field for field, column in columns.items() if column != field})
