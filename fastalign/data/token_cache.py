"""Tokens of a data set on disk, so that the next run with the same rows, tokenizer and options starts in seconds.

An entry has two files, and both are written under another name first:

    <key>.arrow   the tokens, an Arrow stream that is mapped into memory
    <key>.json    the digest of that file, its columns, and the data report

The key is a digest of everything that decides on the tokens (see `token_keys.py`). A file that is damaged is found by
its digest, and written again. Two processes that write the same entry write the same files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa

from fastalign.data.report import DataReport, Lengths
from fastalign.data.token_keys import files_of_rows, token_key
from fastalign.data.token_table import SCHEMA, dataset_of, with_masks
from fastalign.files import atomic_write, write_text

if TYPE_CHECKING:
    from fastalign.data.loading import Rows

logger = logging.getLogger("fastalign")

UNUSED_DAYS = 30  # after which an entry is removed when another one is written
_READ_BYTES = 1 << 20

Compute = Callable[..., tuple[datasets.Dataset, DataReport]]


class MemorySink:
    """Collects tables of tokens in memory."""

    def __init__(self):
        self._tables: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Adds rows, with the columns of `SCHEMA`."""
        self._tables.append(table)

    def finish(self, *, masked: bool, labelled: bool) -> datasets.Dataset:
        """All rows as a data set. `masked` and `labelled` say whether it has masks and labels."""
        tables = [with_masks(table) for table in self._tables] if masked else self._tables
        self._tables = []
        return dataset_of(tables, _columns(masked=masked, labelled=labelled))


class FileSink:
    """Collects tables of tokens in a file, which is then mapped into memory.

    Args:
        path: the file, which is written while it grows.
    """

    def __init__(self, path: Path):
        self.path, self.columns = path, []
        self._writer = pa.ipc.new_stream(str(path), SCHEMA)

    def add(self, table: pa.Table) -> None:
        """Adds rows, with the columns of `SCHEMA`."""
        self._writer.write_table(table)

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()

    def finish(self, *, masked: bool, labelled: bool) -> datasets.Dataset:
        """All rows as a data set. `masked` and `labelled` say whether it has masks and labels."""
        self.close()
        self.columns = _columns(masked=masked, labelled=labelled)
        if masked:  # not known before the last row: the masks that are null get written out
            with atomic_write(self.path) as temporary, pa.OSFile(str(self.path)) as source:
                batches = pa.ipc.open_stream(source)
                with pa.ipc.new_stream(str(temporary), SCHEMA) as writer:
                    for batch in batches:
                        writer.write_table(with_masks(pa.Table.from_batches([batch])))
        return _mapped(self.path, self.columns)


def _columns(*, masked: bool, labelled: bool) -> list[str]:
    unused = {"completion_mask"} if not masked else set()
    return [name for name in SCHEMA.names if name not in unused | (set() if labelled else {"label"})]


def _mapped(path: Path, columns: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_file(str(path)).select_columns(columns)


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one data set on disk.

    Attributes:
        folder: the folder of all entries.
        key: the entry's name.
        stamps: returns times and sizes of the files that hold the rows.
        seen: what it returned before the key was made.
    """

    folder: Path
    key: str
    stamps: Callable[[], list]
    seen: list

    @property
    def _tokens(self) -> Path:
        return self.folder / f"{self.key}.arrow"

    @property
    def _about(self) -> Path:
        return self.folder / f"{self.key}.json"

    def read_or_write(self, compute: Compute) -> tuple[datasets.Dataset, DataReport]:
        """The tokens and their report: those on disk, or else what `compute(sink=...)` returns, which is then stored.

        A folder that cannot be written, or a full disk, is no reason to stop: the tokens are held in memory.
        """
        if (found := self.read()) is not None:
            return found
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_unused(self.folder)
            with atomic_write(self._tokens) as temporary:
                sink = FileSink(temporary)
                try:
                    _, report = compute(sink=sink)
                finally:
                    sink.close()
                about = {"digest": _digest(temporary), "columns": sink.columns, "report": report.to_dict()}
            if self.stamps() == self.seen:  # else somebody has changed a file since its digest was taken
                write_text(self._about, json.dumps(about))
            return _mapped(self._tokens, sink.columns), report
        except OSError as error:
            logger.warning(
                "The tokens cannot be stored in %s (%s), so they are held in memory, and the next run makes them anew.",
                self.folder, error.strerror or error,
            )  # fmt: skip
            return compute(sink=MemorySink())

    def read(self) -> tuple[datasets.Dataset, DataReport] | None:
        """The tokens on disk and their report; None if there are none, or if a file is damaged."""
        if not self._about.exists() or not self._tokens.exists():
            return None
        try:
            about = json.loads(self._about.read_bytes())
            if about["digest"] != _digest(self._tokens):
                raise ValueError("its digest is another one")
            found = _mapped(self._tokens, about["columns"]), _report_from(about["report"])
        except Exception as error:  # a damaged file may raise anything, and is written again
            logger.warning("The stored tokens %s are damaged (%s): they are made anew.", self._tokens, error)
            return None
        with suppress(OSError):  # a folder that is read-only
            for path in (self._tokens, self._about):
                os.utime(path)
        return found


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _report_from(values: Mapping[str, Any]) -> DataReport:
    of_report: dict[str, Any] = {f.name: values[f.name] for f in fields(DataReport)}
    of_report |= {name: Lengths(**values[name]) for name in ("prompt_length", "completion_length")}
    return DataReport(**of_report)


def _remove_unused(folder: Path) -> None:
    """Removes entries that were not used for weeks, and what a process that was killed has left."""
    now = time.time()
    for path in folder.iterdir():
        days = 1 if path.name.endswith(".tmp") else UNUSED_DAYS
        with suppress(OSError):  # another process may have removed it
            if now - path.stat().st_mtime > days * 86400:
                path.unlink()


def find_cache(
    cache_dir: str | Path | None, rows: Rows, tokenizer: Any, options: Mapping[str, Any]
) -> TokenCache | None:
    """Where the tokens of some rows are stored; None if they are not.

    Args:
        cache_dir: the folder; None: nothing is stored.
        rows: the rows, as `fastalign.data.tokenize` takes them.
        tokenizer: the tokenizer.
        options: the options that decide on the tokens.
    """
    if cache_dir is None:
        return None
    stamps = partial(_stamps, files_of_rows(rows) or [])
    seen = stamps()
    key = token_key(rows, tokenizer, options)
    return None if key is None else TokenCache(Path(cache_dir).expanduser(), key, stamps, seen)


def _stamps(files: list[tuple[Path, float]]) -> list:
    stats = [path.stat() for path, _ in files]
    return [(stat.st_mtime_ns, stat.st_size) for stat in stats]
