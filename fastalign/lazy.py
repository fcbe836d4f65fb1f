"""Names of a package that are imported when they are first used, so that importing the package stays cheap."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> None:
    """Gives a package, whose public names live in other modules, its `__getattr__`, `__dir__` and `__all__` (PEP 562).

    A type checker does not run this, so the package also imports the same names under `TYPE_CHECKING`. The three are
    set here, not assigned in the package, because a type checker allows any name of a package that it sees has a
    `__getattr__`.

    Args:
        package: The package's `__name__`.
        homes: For each public name, the module that defines it.

    Examples:
        >>> lazy_exports(__name__, {"EWC": "fastalign.regularizers"})  # doctest: +SKIP
    """
    module: Any = sys.modules[package]

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(module, name, value)  # the next access does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(module), *homes})

    module.__getattr__, module.__dir__, module.__all__ = __getattr__, __dir__, sorted(homes)
