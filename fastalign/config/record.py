"""What run.json says of a run: names of files from the root of the file system, and what can be repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

RECORD = "run.json"
NOT_REPEATABLE = "not_repeatable"  # key of a sentence in run.json: why `fastalign train RUN/run.json` cannot repeat it


def absolute(value: Any) -> Any:
    """The same value with each path of a file or folder that exists as a whole path, also inside lists and mappings."""
    if isinstance(value, list):
        return [absolute(item) for item in value]
    if isinstance(value, dict):
        return {key: absolute(item) for key, item in value.items()}
    path = Path(value).expanduser() if isinstance(value, str) and value else None
    return str(path.resolve()) if path is not None and path.exists() else value


def as_names(source: Any) -> Any:
    """Rows as an option of a command names them, for example {"path": "a.jsonl", "weight": 2}; None if they have none.

    Args:
        source: What a trainer takes as rows: paths and names, also in lists and mappings, or rows in memory.
    """
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, list) and source:
        names = [as_names(item) for item in source if isinstance(item, str | Path) or _has_path(item)]
        return names if len(names) == len(source) else None
    if _has_path(source):
        return {**source, "path": as_names(source["path"])} if as_names(source["path"]) is not None else None
    if isinstance(source, dict) and source:
        found = {key: as_names(value) for key, value in source.items()}
        return found if all(value is not None for value in found.values()) else None
    return None


def _has_path(item: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(item, dict) and "path" in item and set(item) <= {"path", "weight"}


def method_of_losses(losses: list[str]) -> str:
    """The command of a preference method: its first loss that is not the NLL of the chosen answers."""
    return next(loss for loss in losses if loss != "sft")
