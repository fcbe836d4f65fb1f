"""How fastalign writes and reads files: atomic writes, JSON, JSON lines, and tensors by key.

Every line of JSON is strict JSON. JSON has no word for NaN and the infinities, so they are written as the strings
"NaN", "Infinity" and "-Infinity" (the mapping that protobuf uses), and `read_metrics` turns them back into floats.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.errors import ConfigError, DataError

if TYPE_CHECKING:  # numpy takes a quarter of a second to import, and most of this file does without it
    import numpy as np

__all__ = [
    "KEY_BYTES", "KeyedTensors", "append_metrics", "atomic_write", "check_writable",
    "read_json", "read_jsonl", "read_metrics",
    "write_json", "write_jsonl", "write_keyed", "write_text",
]  # fmt: skip

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
KEY_BYTES = 16  # of a key of `KeyedTensors`


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file so that readers see the old content or the new one, never a part of it.

    The caller writes to a temporary file in the same folder. When the block ends, the content is flushed to the disk
    and the temporary file takes the place of `path`. After an error the temporary file is removed, and `path` is as it
    was before.

    Args:
        path: the file to write. Its folder must exist.

    Yields:
        The path of the temporary file, which does not exist yet.

    Examples:
        >>> with atomic_write("weights.safetensors") as temporary:
        ...     save_file(tensors, temporary)
    """
    path = Path(path)
    # A random name, because the processes that share a cache folder may run on several machines.
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()[:12]}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut could leave the new name on content that never reached the disk
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name that the user knows; a full disk gives none
        raise


def check_writable(option: str, folder: str | os.PathLike) -> None:
    """Makes a folder and writes into it for a moment, so that a run finds out before it computes for hours.

    Args:
        option: the option that names the folder, for the error.
        folder: the folder.

    Raises:
        ConfigError: the folder cannot be made or written, for example on a full or a read-only disk.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise ConfigError(
            f"{option} {str(folder)!r} cannot be written: {error.strerror}; name another one, or make room"
        ) from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text to a file, atomically (see `atomic_write`)."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(_to_utf8(text))


# JSON


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write an object as indented JSON, atomically. Values are converted as by `append_metrics`."""
    write_text(path, json.dumps(_plain(obj), ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, atomically. Values are converted as by `append_metrics`."""
    write_text(path, "".join(map(_line, records)))


def append_metrics(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Append one line to a JSONL file, and flush it to the operating system.

    If a process was killed while writing, the file may end with half a line. That half is removed first.

    Args:
        path: the file; it is created if it does not exist.
        record: what to write. Scalars and arrays of numpy and torch become numbers and lists. An object that JSON does
            not know becomes the string that `str` makes of it.
    """
    line = _to_utf8(_line(record))
    with Path(path).open("ab+") as file:
        _end_last_line(file)
        file.write(line)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics file, in the order written. See `read_jsonl` for missing files and damaged lines."""
    return [{key: _number(value) for key, value in record.items()} for record in read_jsonl(path)]


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file, in the order written; an empty list if there is no such file.

    Damaged lines are left out. The last line is left out silently, because a run that is killed while writing leaves
    half a line. For any other damaged line there is a warning.
    """
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
    """The JSON object in a file; an empty dict if there is no such file.

    Raises:
        DataError: the file holds no valid JSON, or a JSON value that is not an object.
    """
    try:
        obj = json.loads(Path(path).read_bytes(), parse_int=_parse_int)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): mend the file or delete it.") from error
    if not isinstance(obj, dict):
        raise DataError(f"{path} holds a JSON {type(obj).__name__}, not an object: mend the file or delete it.")
    return obj


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), ensure_ascii=False) + "\n"


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
    # An integer larger than every float would raise an error in later arithmetic: read it as infinity.
    return int(digits) if len(digits) <= 300 else float(digits)


def _number(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _to_utf8(text: str) -> bytes:
    # Lone surrogates have no UTF-8. They are written as \udXXX, which JSON reads back as the same surrogate.
    return text.encode("utf-8", errors="backslashreplace")


def _end_last_line(file) -> None:
    """Make sure that a file, open for reading and appending, ends with a whole line.

    A last line that is a JSON object gets its line break. A last line that is not one is removed.
    """
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


# Tensors by key


def write_keyed(
    path: str | os.PathLike,
    keys: Sequence[bytes],
    values: Mapping[str, Sequence[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays of several lengths under keys into one safetensors file, atomically. Missing folders are made.

    The file holds the arrays of each name one after another, and where each of them starts:

        keys      (C, 16) uint8
        offsets   (C + 1,) int64: the arrays of key i are the rows offsets[i] to offsets[i + 1] of each tensor below
        <name>    (T, ...), one tensor for each name in `values`; T is the sum of the lengths

    Args:
        path: the file to write.
        keys: C different keys of `KEY_BYTES` bytes each, C >= 1.
        values: for each name, C arrays, one for each key. The arrays of one key have the same length under all names.
        metadata: strings that are stored in the file's header.
    """
    import numpy as np
    from safetensors.numpy import save_file

    path = Path(path)
    lengths = [len(array) for array in next(iter(values.values()))]
    tensors = {
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES).copy(),
        "offsets": np.cumsum([0, *lengths]).astype(np.int64),
        **{name: np.concatenate(arrays) for name, arrays in values.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, None if metadata is None else dict(metadata))


class KeyedTensors:
    """A file that `write_keyed` wrote. The arrays of one key are read from the file when they are needed.

    Args:
        path: the file.
        names: the names of the tensors that the file must hold besides keys and offsets.

    Attributes:
        spans: for each key, the first row of its arrays and the row behind the last one.
        metadata: the strings in the file's header.

    Raises:
        DataError: the file is missing or damaged, or its tensors do not fit together.
    """

    def __init__(self, path: str | os.PathLike, names: Sequence[str]):
        from safetensors import safe_open

        try:
            self._file = safe_open(path, "numpy")
            keys, offsets = self._file.get_tensor("keys"), self._file.get_tensor("offsets").tolist()
            self._tensors = {name: self._file.get_slice(name) for name in names}
            sizes = {tensor.get_shape()[0] for tensor in self._tensors.values()}
            if keys.shape[1:] != (KEY_BYTES,) or len(offsets) != len(keys) + 1 or sizes != {offsets[-1]}:
                raise ValueError("its tensors do not fit together")
        except Exception as error:  # safetensors has no common one for missing files, damaged files and missing tensors
            raise DataError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
        self.spans = {key.tobytes(): span for key, span in zip(keys, pairwise(offsets), strict=True)}
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __contains__(self, key: bytes) -> bool:
        return key in self.spans

    def read(self, name: str, key: bytes) -> np.ndarray:
        """The array of one name under one key."""
        start, stop = self.spans[key]
        if start == stop:  # safetensors refuses an empty slice at the end of a tensor
            start = stop = 0
        return self._tensors[name][start:stop]

    def read_all(self, name: str) -> dict[bytes, np.ndarray]:
        """The arrays of one name under every key, by key. The file is read once."""
        whole = self._file.get_tensor(name)
        return {key: whole[start:stop] for key, (start, stop) in self.spans.items()}
