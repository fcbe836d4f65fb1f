"""Options as a user gives them: recipes, YAML files and key=value on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastalign.cli import table
from fastalign.cli.methods import METHODS
from fastalign.cli.run_options import RunOptions
from fastalign.errors import ConfigError
from fastalign.options import nearest

RECIPES = Path(__file__).parent.parent / "recipes"


def recipes() -> list[str]:
    """The names of the recipes that ship with fastalign."""
    return sorted(path.parent.name for path in RECIPES.glob("*/recipe.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe that ships with fastalign, or of a YAML file.

    Raises:
        ConfigError: There is neither a recipe nor a file of that name, or the file is not valid.
    """
    if name in recipes():
        return read_yaml(RECIPES / name / "recipe.yaml")
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"There is no recipe or file {name!r}; {nearest(name, recipes())}")
    if path.suffix == ".json":
        return _read_record(path)
    return read_yaml(path)


def _read_record(path: Path) -> dict[str, Any]:
    from fastalign.cli.record import read_record

    return read_record(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of a YAML file. Paths in it that start with ./ or ../ are resolved from its folder.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or is not a mapping.
    """
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ConfigError(f"The configuration {path} must be a mapping of option names to values")
    return _resolve_paths(dict(options), path.parent)


def read_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """Options from `key=value` words. A value is read as YAML, so `beta=0.1` is a number and `beta=` is None.

    Raises:
        ConfigError: A word has no `=`, or its value is not YAML.
    """
    options = {}
    for item in arguments:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"{item!r} is not of the form key=value")
        options[key] = _read_value(item, value)
    return options


def _read_value(item: str, value: str) -> Any:
    if not value:
        return None
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{item!r} is not valid YAML after the =; quote the value") from None


def _resolve_paths(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same options, with each declared path that starts with ./ or ../ resolved from `folder`."""
    declared = {f.name for f in fields(RunOptions) if f.metadata.get("path")}
    for method in METHODS:
        declared |= table.paths(table.own(method))
    resolved = _with_paths(options, declared, folder)
    regularizers = resolved.get("regularizers")
    if isinstance(regularizers, list):
        resolved["regularizers"] = [_of_regularizer(mapping, folder) for mapping in regularizers]
    return resolved


def _of_regularizer(mapping: Any, folder: Path) -> Any:
    # What is not a mapping, or has an unknown name, is refused later, where the error can say more.
    known = table.read()["regularizers"]
    if not isinstance(mapping, dict) or mapping.get("name") not in known:
        return mapping
    return _with_paths(mapping, table.paths(known[mapping["name"]]), folder)


def _with_paths(options: Mapping[str, Any], declared: set[str], folder: Path) -> dict[str, Any]:
    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if isinstance(value, dict):
            return {key: resolve(item) for key, item in value.items()}
        relative = isinstance(value, str) and value.startswith(("./", "../"))
        return str((folder / value).resolve()) if relative else value

    return {key: resolve(value) if key in declared else value for key, value in options.items()}
