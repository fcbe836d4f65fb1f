"""A file of tensors by key that several processes compute together, each of them a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastalign.data.processes import gather_objects, process_count, process_index
from fastalign.errors import DataError
from fastalign.files import KeyedTensors, write_keyed


def own_part(batches: Sequence[list[int]]) -> list[list[int]]:
    """The batches that this process computes: every n-th one, with n processes."""
    return list(batches[process_index() :: process_count()])


def write_parts(
    path: Path,
    keys: Sequence[bytes],
    values: Mapping[str, Sequence[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`fastalign.files.write_keyed` of what all processes have. Each writes its part, and process 0 joins them.

    Every process must call it, also one without keys. When it returns, the file is complete.

    Args:
        path: The file. Its folder must be one that all processes see.
        keys: The keys of this process, which may be none.
        values: As for `write_keyed`.
        metadata: Likewise, the same in all processes.

    Raises:
        DataError: A part or the file could not be written, or process 0 does not see a part. All processes raise it.
    """
    if process_count() == 1:
        write_keyed(path, keys, values, metadata)
        return
    error = None
    if process_index() > 0 and keys:
        error = _error_of(lambda: write_keyed(_part(path, process_index()), keys, values, metadata))
    told = gather_objects((len(keys), error))
    error = next((error for _, error in told if error), None)
    if error is None:
        parts = [_part(path, process) for process, (count, _) in enumerate(told) if process and count]
        joins = process_index() == 0
        error = gather_objects(_error_of(lambda: _join(path, keys, values, metadata, parts)) if joins else None)[0]
    if error is not None:
        raise DataError(f"{path} cannot be written: {error}.")


def _error_of(write) -> str | None:
    """What went wrong, if anything: all processes have to know it, so nothing is raised here."""
    try:
        write()
    except Exception as error:  # whatever it is, the others must not wait for this process
        return " ".join(str(error).split())
    return None


def _join(path: Path, keys, values, metadata, parts: list[Path]) -> None:
    keys, values = list(keys), {name: list(arrays) for name, arrays in values.items()}
    for part in parts:
        if not part.exists():
            raise DataError("process 0 does not see what another process wrote: name a folder that all machines share")
        of_part = KeyedTensors(part, list(values))
        known = set(keys)
        new = [key for key in of_part.spans if key not in known]  # a completion may stand in rows of two processes
        keys += new
        for name, arrays in values.items():
            found = of_part.read_all(name)
            arrays += [found[key] for key in new]
    write_keyed(path, keys, values, metadata)
    for part in parts:
        part.unlink()


def _part(path: Path, process: int) -> Path:
    return path.with_name(f".{path.name}.part-{process}")
