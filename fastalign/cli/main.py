"""The command line's entry: the parser, exit codes, and one sentence for each error."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from fastalign import __version__
from fastalign.cli import (
    chat,
    compare,
    data,
    diagnose,
    evaluate,
    fisher,
    generate,
    info,
    merge,
    plan,
    report,
    score,
    table,
    tax,
    train,
)
from fastalign.cli.methods import commands as training_commands
from fastalign.errors import ConfigError, FastAlignError, printable, resource_sentence
from fastalign.options import closest

COMMANDS = (train, plan, report, diagnose, generate, chat, compare, evaluate, score, merge, data, tax, fisher, info)
_EPILOG = """\
Every preference loss is a command, by its name here or in TRL:
{losses}

Options are key=value, in a YAML file or on the command line (which wins). `fastalign dpo --help` lists them.
Exit codes: 0 done, or yes; 1 done, and the answer is no; 2 stopped by an error; 130, 143 stopped by a signal.

examples:
  fastalign train dpo-smollm2               a recipe: DPO of a packaged model, some minutes on a laptop
  fastalign dpo model=./model train=pairs.jsonl eval=held_out.jsonl beta=0.2 learning_rate=5e-5
  fastalign sft --config run.yaml num_train_epochs=2
  fastalign data check pairs.jsonl --model ./model
"""


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt it is no Exception, so that nothing handles it on the way out."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one sentence, like all others of fastalign."""

    def error(self, message: str) -> NoReturn:
        """Reports a wrong argument.

        Raises:
            ConfigError: Always, where argparse would print its usage and exit.
        """
        if unknown := re.match(r"unrecognized arguments: --([\w-]+)", message):
            name = unknown[1].replace("-", "_")
            raise ConfigError(f"There is no --{unknown[1]}; options are written {name}=VALUE, see `{self.prog} --help`")
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after `fastalign`; None takes those of this process.

    Returns:
        The exit status: 0 done, or yes; 1 done, and the answer is no; 2 stopped by an error, which is said in one
        sentence; 130 and 143 stopped by SIGINT and SIGTERM.
    """
    # Of several processes the first one warns; the others would say the same.
    logging.basicConfig(format="%(message)s", level=logging.ERROR if _process_index() else logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries; users can do nothing about them
    warnings.filterwarnings("ignore", message="Could not find a config file")  # peft, of a model that is a GGUF file
    args = argparse.Namespace()
    try:
        with _sigterm_raises():
            parse(sys.argv[1:] if argv is None else argv, args)
            return args.main(args)
    except FastAlignError as error:
        return _stopped(str(error), 2)
    except KeyboardInterrupt:
        return _stopped("stopped", 130)
    except Terminated:
        return _stopped("stopped", 143)
    except Exception as error:
        if sentence := resource_sentence(error):
            return _stopped(sentence, 2)
        # Nothing foresaw it: the traceback is for whoever mends it, not for the terminal.
        where = _write_traceback(error, getattr(args, "run_folder", None) or getattr(args, "out", None))
        said = " ".join(str(error).split())[:300]
        return _stopped(f"stopped by {type(error).__name__}: {said} ({where})", 2)


def parse(argv: list[str], args: argparse.Namespace) -> None:
    """Parses the words of a command into `args`, whose `main` then runs it.

    Args:
        argv: The words after `fastalign`.
        args: What is filled in: the arguments of the command, and its function as `main`.

    Raises:
        ConfigError: A command or an argument is unknown or missing.
    """
    parser = Parser(
        prog="fastalign",
        description="Align a language model on this machine.",
        epilog=_EPILOG.format(losses=_wrap(table.losses())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastalign {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add(commands)
    if argv and not argv[0].startswith("-") and argv[0] not in commands.choices:
        close = closest(argv[0], commands.choices)
        remedy = f"did you mean {close!r}?" if close else "`fastalign --help` lists the commands"
        raise ConfigError(f"There is no command {argv[0]!r}; {remedy}")
    if argv and (argv[0] == "train" or argv[0] in training_commands()):
        from fastalign.cli.words import as_assignments  # the other commands, and --help, do not need it

        argv = [argv[0], *as_assignments(argv[1:])]
    parser.parse_args(argv, args)


def _wrap(names: list[str]) -> str:
    return textwrap.fill(", ".join(names), 100, initial_indent="  ", subsequent_indent="  ")


def _process_index() -> int:
    """The number of this process, from 0, as torchrun and accelerate say it."""
    index = os.environ.get("RANK", "")
    return int(index) if index.isdigit() else 0


def _stopped(sentence: str, status: int) -> int:
    of_process = f" (process {_process_index()})" if _process_index() else ""
    print(printable(f"fastalign{of_process}: {sentence}"), file=sys.stderr)
    return status


def _write_traceback(error: Exception, folder: str | Path | None) -> str:
    """Writes the traceback into the run or output folder, else into a temporary one. Returns where it is, in words."""
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    for make in (lambda: Path(folder) if folder else None, lambda: Path(tempfile.mkdtemp(prefix="fastalign-"))):
        with contextlib.suppress(OSError):  # a disk may be full, or a folder read-only
            place = make()
            if place is not None and place.is_dir():
                path = place / "traceback.txt"
                path.write_text(text, encoding="utf-8", errors="backslashreplace")
                return f"the traceback is in {path}"
    return "no folder can be written, so there is no traceback"


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises Terminated here, so that files half written are removed on the way out, as for Ctrl-C."""

    def terminate(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only that thread may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
