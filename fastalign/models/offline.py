"""Keeps the import of bitsandbytes from downloading anything.

On a CPU with bfloat16 instructions, importing bitsandbytes 0.50 calls `kernels.get_kernel`, which downloads a native
library from the hub and runs it. Where the package `kernels` is missing, it logs a warning instead, at every start.
fastalign needs none of this: bitsandbytes brings its kernels along. `transformers` and peft import bitsandbytes in many
places, so a guard in fastalign's import of it would come too late. Python's import system is the one place that
all of them go through.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def guard_imports() -> None:
    """Guards imports of bitsandbytes from now on. Calling it again changes nothing."""
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())


class _Guard:
    """Finds bitsandbytes as Python does, and lets its loader run without `kernels`.

    `importlib.abc.MetaPathFinder` would be its base class, but importing that imports nine modules at every start.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of bitsandbytes with a guarded loader; None, which means "look elsewhere", for other modules."""
        if fullname != "bitsandbytes":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            loader: Any = spec.loader
            execute = loader.exec_module

            def guarded(module: ModuleType) -> None:
                with _without_kernels():
                    execute(module)

            loader.exec_module = guarded
        return spec


@contextmanager
def _without_kernels() -> Iterator[None]:
    """A context in which `import kernels` fails, and bitsandbytes does not warn that it did."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = sys.modules.get("kernels")
    was_imported = "kernels" in sys.modules
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]  # documented: makes the import fail
    logger.addFilter(_is_other_message)
    try:
        yield
    finally:
        logger.removeFilter(_is_other_message)
        del sys.modules["kernels"]
        if was_imported:
            sys.modules["kernels"] = before  # pyright: ignore[reportArgumentType]  # may have been None


def _is_other_message(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)
