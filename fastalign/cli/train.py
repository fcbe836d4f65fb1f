"""`fastalign train RECIPE`, and a command for each method: `fastalign sft`, `fastalign dpo` and so on."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from fastalign.cli import configuration, memory_limit, methods, table, trl
from fastalign.cli.foreign import remedy
from fastalign.cli.run_options import RunOptions, paths_of
from fastalign.errors import ConfigError
from fastalign.options import from_mapping, nearest

# The commands that `fastalign --help` lists. It names the other losses below that list.
LISTED = ("sft", "distill", "dpo", "orpo", "kto", "reward", "grpo", "rloo")
# What names a file by its ending, and must therefore be there.
_FILES = {".jsonl", ".json", ".parquet", ".csv", ".txt", ".safetensors", ".gguf"}


def add(commands: Any) -> None:
    """Adds `train` and a command for each method to the parser's commands."""
    train = commands.add_parser("train", help="run a recipe: a name that ships with fastalign, or a YAML file")
    train.add_argument("recipe", help=f"one of {', '.join(configuration.recipes())}, or the path of a YAML file")
    train.add_argument("options", nargs="*", metavar="key=value", help="options that replace those of the file")
    train.set_defaults(main=main, method=None)
    for name, row in methods.commands().items():
        # argparse takes a command without `help`, and leaves it out of its list.
        listed = {"help": _help(name, row)} if name in LISTED else {}
        method = commands.add_parser(
            name, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_options_help(row), **listed
        )
        method.add_argument("--config", metavar="FILE", help="a YAML file of options")
        method.add_argument("options", nargs="*", metavar="key=value", help="options that replace those of the file")
        method.set_defaults(main=main, method=name)


def main(args: argparse.Namespace) -> int:
    """Checks the options, then trains. What can be checked without torch is checked before torch is imported."""
    options, translation = _read(args), None
    if trl.is_trl(options):
        translation = trl.translate(options, _has_gpu)
        options = translation.options
    of_run, of_method, row = check(options)
    if of_run.memory_limit is not None:
        memory_limit.check_limit(of_run, of_method, row)

    from transformers.utils import logging as transformers_logging

    from fastalign.cli.run import run_training

    transformers_logging.disable_progress_bar()  # one bar at a time: ours
    config = from_mapping(methods.load_class(methods.METHODS[row].config), of_method)
    args.run_folder = Path(config.output_dir)
    run_training(of_run, config, _resuming_command(args), translation)
    return 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _resuming_command(args: argparse.Namespace) -> str:
    """The command that goes on with this one's run."""
    words = ["fastalign", "train", args.recipe] if args.method is None else ["fastalign", args.method]
    if args.method is not None and args.config:
        words += ["--config", args.config]
    options = [option for option in args.options if not option.startswith("resume_from_checkpoint=")]
    return shlex.join([*words, *options, "resume_from_checkpoint=last"])


def _read(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the file, the method that the command names, and over both the words of the command line."""
    if args.method is None:
        options = configuration.read_recipe(args.recipe)
    else:
        options = configuration.read_yaml(Path(args.config)) if args.config else {}
        options["method"] = args.method
    return {**options, **configuration.read_arguments(args.options)}


def check(options: Mapping[str, Any]) -> tuple[RunOptions, dict[str, Any], str]:
    """Checks the options of a run by the table of options: names, types, required ones, and files that must be there.

    Args:
        options: Every option by name, `method` among them.

    Returns:
        The options of the run, those of the method, and the method's row in METHODS.

    Raises:
        ConfigError: An option is unknown or missing, has another type, or names a file that is not there.
    """
    commands = methods.commands()
    options = dict(options)
    method = options.pop("method", None)
    if method not in commands:
        raise ConfigError(f"method is {method!r}; {nearest(str(method), commands)}")
    row = commands[method]
    if methods.METHODS[row].losses or methods.METHODS[row].names:
        options.setdefault("loss_type", method)
    names_of_run = [f.name for f in fields(RunOptions)]
    known = table.of_method(row)
    _check_names(options, [*names_of_run, *known, "method"], row)
    of_run = {key: value for key, value in options.items() if key in names_of_run}
    of_method = {key: value for key, value in options.items() if key not in names_of_run}
    table.check_types(of_method, known)
    run = from_mapping(RunOptions, of_run)
    _check_files(run, of_method, table.paths(known))
    return run, of_method, row


def _check_names(options: Iterable[str], known: list[str], row: str) -> None:
    for key in options:
        if key not in known and not _is_newer(key, row):
            raise ConfigError(f"Unknown option {key!r}; {remedy(key, known)}")


def _is_newer(key: str, row: str) -> bool:
    """Whether the installed transformers has an option that the table's did not have."""
    from importlib.metadata import version

    if version("transformers") == table.read()["transformers"]:
        return False  # the table is complete, so the seconds of the import are spared
    return key in {f.name for f in fields(methods.load_class(methods.METHODS[row].config)) if f.init}


def _check_files(run: RunOptions, of_method: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Refuses files that are not there. The folders of caches are made when they are needed."""
    for name in ("train", "eval"):
        for path in paths_of(getattr(run, name)):
            _check_rows(name, path)
    _check_path("model", run.model)
    for name in paths:
        if not name.endswith("_dir"):
            _check_path(name, of_method.get(name))
    for mapping in run.regularizers or []:
        for name in table.paths(table.regularizer(mapping["name"])):
            if not name.endswith("_dir"):
                _check_path(f"{name} of {mapping['name']}", mapping.get(name))
    checkpoint = of_method.get("resume_from_checkpoint")
    if isinstance(checkpoint, str) and checkpoint.lower() not in ("last", "true") and not Path(checkpoint).is_dir():
        raise ConfigError(f"resume_from_checkpoint is {checkpoint!r}, which is no folder; write last for the newest")


def _check_path(name: str, value: Any) -> None:
    """Refuses a missing file or model folder; a list is checked item by item."""
    for path in value if isinstance(value, list) else [value]:
        if not isinstance(path, str):
            continue  # None, or rows in the place of a file
        if Path(path).suffix in _FILES:
            _check_file(name, path)
        # Anything else may be a packaged model, a model of a hub, or a word such as `start`.
        elif path.startswith((".", "/", "~")) and not Path(path).expanduser().exists():
            raise ConfigError(f"{name}: there is no model folder {path!r}; check the path")


def _check_rows(name: str, path: str) -> None:
    if not path.startswith("hub:") and not Path(path).expanduser().exists():
        raise ConfigError(f"{name}: {path} is not a file or a folder; check the path (hub:owner/name reads the hub)")


def _check_file(name: str, path: str) -> None:
    if not Path(path).expanduser().is_file():
        raise ConfigError(f"{name}: {path} is not a file; check the path (only local files are read)")


# Help


def _help(name: str, row: str) -> str:
    method = methods.METHODS[row]
    if method.names:
        return f"{method.help}: {name}"
    return f"{method.help}: the loss {name}" if method.losses else method.help


def _options_help(row: str) -> str:
    """Every option of a method with its meaning and default: those of the run, of fastalign, of transformers."""
    inherited = table.inherited()
    own = table.own(row)
    lines = ["options of the run:"]
    lines += [_line(f.name, f.metadata["help"], f.default) for f in fields(RunOptions) if f.default is not MISSING]
    lines += ["", "options of the method:"]
    # An option without a help text has only one valid value. It is in the table, so that another value is refused.
    shown = {name: option for name, option in own.items() if "help" in option}
    lines += [_line(name, option["help"], option.get("default")) for name, option in shown.items()]
    lines += ["", "options of transformers.TrainingArguments:"]
    lines += [
        _line(name, option.get("help", ""), option.get("default"))
        for name, option in inherited.items()
        if name not in own
    ]
    return "\n".join(lines)


def _line(name: str, text: str, default: Any) -> str:
    head = f"  {name:<27} "
    return textwrap.fill(f"{text} [{default}]", 120, initial_indent=head, subsequent_indent=" " * len(head))
