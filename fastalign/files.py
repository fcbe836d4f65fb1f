"""The files of a run folder: JSON written whole or not at all, and metrics as one JSON object per line.

Every line is strict JSON. JSON has no word for NaN and the infinities, so they are written as the strings "NaN",
"Infinity" and "-Infinity" (as in protobuf's JSON mapping), and become floats again in `read_metrics`.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign.errors import DataError

__all__ = ["append_metrics", "read_json", "read_jsonl", "read_metrics", "write_json", "write_text"]

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def append_metrics(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Append one line to a JSONL file, and flush it to the operating system.

    Half a last line, left by a process killed while writing, is cut off first. Numpy and torch scalars become numbers,
    objects that JSON does not know their string.
    """
    line = _encode(json.dumps(_plain(record), ensure_ascii=False) + "\n")
    with open(path, "ab+") as file:
        _end_last_line(file)
        file.write(line)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write an object as indented JSON, atomically. Values are converted as by `append_metrics`."""
    write_text(path, json.dumps(_plain(obj), ensure_ascii=False, indent=2) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically: readers see the old file or the new one, also if this process dies half way."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(_encode(text))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics file, in the order written; empty if there is no such file.

    Damaged lines are left out: the last one silently (a run killed while writing leaves it so), others with a warning.
    """
    return [{key: _number(value) for key, value in record.items()} for record in read_jsonl(path)]


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file; damaged lines are treated as in `read_metrics`."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    records, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            damaged.append(number)
        else:
            records.append(record)
    inner = [number for number in damaged if number < len(lines)]
    if inner:
        warnings.warn(f"{path}: left out what is not a JSON object, line {', '.join(map(str, inner))}.", stacklevel=2)
    return records


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file. Raises DataError if the file holds anything else."""
    try:
        obj = json.loads(Path(path).read_bytes(), parse_int=_parse_int)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): mend the file or delete it.") from error
    if not isinstance(obj, dict):
        raise DataError(f"{path} holds a JSON {type(obj).__name__}, not an object: mend the file or delete it.")
    return obj


def _plain(obj: Any) -> Any:
    """Strict JSON's equivalent of an object."""
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        if math.isfinite(obj):
            return float(obj)
        return "NaN" if math.isnan(obj) else "Infinity" if obj > 0 else "-Infinity"
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, set | frozenset):
        return sorted((_plain(value) for value in obj), key=str)
    if hasattr(obj, "tolist"):  # numpy and torch, scalars and arrays
        return _plain(obj.tolist())
    return str(obj)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line, or None if there is none."""
    try:
        record = json.loads(line, parse_int=_parse_int)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _parse_int(digits: str) -> int | float:
    return (
        int(digits) if len(digits) <= 300 else float(digits)
    )  # what no float can hold is infinite, not an error later


def _number(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _encode(text: str) -> bytes:
    # Lone surrogates have no UTF-8: they become \udXXX, which JSON reads back as what they were.
    return text.encode("utf-8", errors="backslashreplace")


def _end_last_line(file) -> None:
    """Make a file, open for reading and appending, end with a whole line: end the last one, or cut off its torso."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    if _parse(content[start:]) is None:
        file.truncate(start)
    else:
        file.write(b"\n")
