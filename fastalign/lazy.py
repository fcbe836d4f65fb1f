"""Names of a package that are imported when they are first used, so that importing the package stays cheap."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from fastalign.options import nearest


def lazy_exports(package: str, homes: Mapping[str, str]) -> None:
    """Gives a package, whose public names live in other modules, its `__getattr__`, `__dir__` and `__all__` (PEP 562).

    A type checker does not run this, so the package also imports the same names under `TYPE_CHECKING`. The three are
    set here, not assigned in the package, because a type checker allows any name of a package that it sees has a
    `__getattr__`.

    Args:
        package: The package's `__name__`.
        homes: For each public name, the module that defines it. A name that ends in `*` stands for all names of that
            module with the same beginning. Only importing the module can list them, so `__all__` is made when it is
            read.
    """
    module: Any = sys.modules[package]
    single = {name: home for name, home in homes.items() if not name.endswith("*")}
    families = {name[:-1]: home for name, home in homes.items() if name.endswith("*")}

    def members(prefix: str) -> list[str]:
        return [name for name in dir(importlib.import_module(families[prefix])) if name.startswith(prefix)]

    def all_names() -> list[str]:
        return sorted({*single, *(name for prefix in families for name in members(prefix))})

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return all_names()
        home, known = single.get(name), [*single]
        for prefix in families:
            if name.startswith(prefix):
                known = members(prefix)
                home = families[prefix] if name in known else None
        if home is None:
            # Python itself looks for names with underscores that packages seldom have: no need for a suggestion.
            hint = "" if name.startswith("_") else f"; {nearest(name, known)}"
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}", name=name)
        value = getattr(importlib.import_module(home), name)
        setattr(module, name, value)  # the next access does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(module), *all_names()})

    module.__getattr__, module.__dir__ = __getattr__, __dir__
    if not families:
        module.__all__ = sorted(single)
