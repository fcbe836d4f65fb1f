"""run.json: the options of a run, written so that `fastalign train RUN/run.json` repeats it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.cli import table
from fastalign.cli.methods import METHODS, commands, method_of
from fastalign.cli.run_options import RunOptions
from fastalign.config.record import NOT_REPEATABLE, absolute, method_of_losses
from fastalign.errors import ConfigError
from fastalign.files import read_json
from fastalign.options import nearest

if TYPE_CHECKING:
    from fastalign.config.base import AlignmentConfig

# What a repeated run must not take over: it goes into another folder, and it starts from the start.
_NOT_REPEATED = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "logging_dir", "local_rank")


def run_record(options: RunOptions, config: AlignmentConfig) -> dict[str, Any]:
    """Every option of a run by name, `method` among them. Local files are named from the root of the file system.

    Args:
        options: The options of the run.
        config: The options of the method. In the place of a token for the hub `to_dict` puts a word.
    """
    of_run = {
        key: absolute(value) if key in ("model", "train", "eval") else value for key, value in vars(options).items()
    }
    method = method_of(config)
    name = next(key for key, row in METHODS.items() if row is method)
    if method.losses:
        name = method_of_losses(getattr(config, "loss_type"))  # noqa: B009 -- not in the base class
    if method.names:
        name = getattr(config, "loss_type")  # noqa: B009 -- likewise
    return {"method": name, **of_run, **config.to_dict()}


def read_record(path: Path) -> dict[str, Any]:
    """The options that repeat the run of a run.json: those that are not at their default, and a free output folder.

    Raises:
        ConfigError: The file holds no options of a run that can be repeated.
    """
    record = read_json(path)
    method = record.get("method")
    if method not in commands():
        raise ConfigError(f"{path}: method is {method!r}; {nearest(str(method), commands())}")
    if why := record.get(NOT_REPEATABLE):
        raise ConfigError(
            f"{path} is of a trainer in Python that no command can repeat: {why}; run that program again, or give the "
            "trainer the names of a model and of files"
        )
    if not record.get("train"):
        raise ConfigError(f"{path} names no training file, since the rows were given in memory; add train=FILE")
    defaults = {f.name: f.default for f in fields(RunOptions)}
    defaults |= {name: option.get("default") for name, option in table.of_method(commands()[method]).items()}
    kept = {
        key: value
        for key, value in record.items()
        if key not in _NOT_REPEATED and value is not None and value != [] and value != defaults.get(key, ...)
        and not (key.endswith("_token") and str(value).startswith("<"))
    }  # fmt: skip
    return {**kept, "output_dir": str(_free(path.resolve().parent))}


def _free(folder: Path) -> Path:
    """The first of RUN-2, RUN-3 and so on that does not exist."""
    number = 2
    while (other := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return other
