"""Values by key, written while they are computed: a run that is killed loses some seconds of its work.

<name>.safetensors     the values of every pass that came to its end
<name>.parts/          what a pass that goes on has computed, a file for every some seconds
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastalign.errors import DataError
from fastalign.files import KeyedTensors, write_keyed

logger = logging.getLogger("fastalign")

WRITE_SECONDS = 20.0  # between two files of a pass


class KeyedLog:
    """The values of one file, and of the passes that have not come to their end.

    Args:
        path: the file, which `fastalign.files.write_keyed` writes.
        name: the name of its tensor.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.folder = path.with_suffix(".parts")
        self._new: dict[bytes, np.ndarray] = {}
        self._parts: list[Path] = []  # of this pass, and of passes before it that were stopped
        self._written = time.monotonic()
        self._fails = False

    def read(self) -> dict[bytes, np.ndarray]:
        """All that is stored, by key. What is damaged is left out, with a warning."""
        found: dict[bytes, np.ndarray] = {}
        self._parts = sorted(self.folder.glob("*.safetensors"))
        for path in (*self._parts, self.path):
            found |= self._read(path)
        return found

    def _read(self, path: Path) -> dict[bytes, np.ndarray]:
        if not path.exists():
            return {}
        try:
            return KeyedTensors(path, [self.name]).read_all(self.name)
        except DataError as error:  # a damaged cache is no reason to stop: its values are computed again
            logger.warning("The reference cache is computed again: %s.", error)
            return {}

    def add(self, values: Mapping[bytes, np.ndarray]) -> None:
        """Adds values, which are written some seconds later. A disk that is full stops no pass."""
        self._new |= values
        if time.monotonic() - self._written < WRITE_SECONDS or self._fails:
            return
        # A random name, since several processes write here.
        path = self.folder / f"{os.urandom(8).hex()}.safetensors"
        try:
            write_keyed(path, list(self._new), {self.name: list(self._new.values())})
        except Exception as error:  # of the disk, or of safetensors, which has no common class with OSError
            logger.warning("%s cannot be written, so a run that is stopped begins this pass again: %s", path, error)
            self._fails = True
            return
        self._parts.append(path)
        self._new, self._written = {}, time.monotonic()

    def clear(self) -> None:
        """Removes the files of the passes. What they hold must be in the file."""
        for path in self._parts:
            path.unlink(missing_ok=True)
        self._parts = []
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()
