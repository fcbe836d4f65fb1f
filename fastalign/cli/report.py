"""`fastalign report RUN`: the page of a run that has ended, was stopped, or still goes on."""

from __future__ import annotations

import argparse
import time
from typing import Any

from fastalign.errors import ConfigError


def add(commands: Any) -> None:
    """Adds `report` to the parser's commands."""
    parser = commands.add_parser("report", help="write the page of a run, also of one that runs or was stopped")
    parser.add_argument("run", help="a run folder")
    parser.add_argument(
        "--watch", type=int, metavar="SECONDS", help="write it again and again until training ends; the page reloads"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Writes report.html into the run folder, and prints its path."""
    if args.watch is not None and args.watch < 1:
        raise ConfigError(f"watch is {args.watch}; give 1 second or more")

    from fastalign.report.page import write_report
    from fastalign.report.state import check_run, has_ended, state_of

    folder = check_run(args.run)
    while args.watch and not has_ended(folder):
        path = write_report(folder, refresh=args.watch)
        print(f"\r{state_of(folder)} {path}", end="", flush=True)
        time.sleep(args.watch)
    path = write_report(folder)
    if state := state_of(folder):
        print(state)
    print(f"Report {path}")
    return 0
