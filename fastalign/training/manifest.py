"""The manifest of a checkpoint: which files it holds, how large they are, and their checksums.

The manifest is the last file that is written into a checkpoint. So a folder without one was not finished, and a folder
with one can be checked file by file.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from fastalign.errors import DataError
from fastalign.files import read_json, write_json

MANIFEST = "manifest.json"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def write_manifest(folder: Path, step: int) -> None:
    """Flushes every file of a checkpoint to the disk, then writes the manifest that lists them.

    Args:
        folder: The checkpoint, complete but for the manifest.
        step: Optimiser steps that were made.
    """
    flush_files(folder)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"format": 1, "step": step, "files": files})
    flush_folder(folder)


def flush_files(folder: Path) -> None:
    """Makes everything in a folder reach the disk, its names too."""
    for path in folder.rglob("*"):
        if path.is_dir():
            flush_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Makes new names in a folder reach the disk."""
    with suppress(OSError):  # some file systems cannot flush a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def find_damage(checkpoint: Path, *, checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence that starts with its path; None if it is whole.

    Args:
        checkpoint: The folder.
        checksums: Whether every file is read and its checksum compared. Otherwise only names and sizes are.
    """
    try:
        files = read_json(checkpoint / MANIFEST).get("files")
    except DataError:
        return f"has a damaged {MANIFEST}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not isinstance(files, dict) or not files:
        return f"has no {MANIFEST}: it was not finished, or something else wrote it"
    for name, facts in files.items():
        path = checkpoint / name
        if path.suffix in _PICKLES:
            return f"lists {name}, a pickle, which is never read"
        if not path.is_file():
            return f"lacks the file {name}"
        if not isinstance(facts, dict) or path.stat().st_size != facts.get("bytes"):
            return f"has a damaged file: {name} has {path.stat().st_size} bytes"
        if checksums and _sha256(path) != facts.get("sha256"):
            return f"has a damaged file: the checksum of {name} is not that of the manifest"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()  # `hashlib.file_digest` is not in Python 3.10
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
