"""`fastalign diagnose RUN`: what the logged numbers of a run show to be wrong, and what to try."""

from __future__ import annotations

import argparse
from typing import Any

from fastalign.errors import ConfigError


def add(commands: Any) -> None:
    """Adds `diagnose` to the parser's commands."""
    parser = commands.add_parser("diagnose", help="say what went wrong in a run, running or not, and what to try")
    parser.add_argument("run", nargs="?", help="a run folder")
    parser.add_argument("--list", action="store_true", help="print the table of diagnostics instead")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Prints what fires; 1 if something does."""
    from fastalign.errors import printable
    from fastalign.report.diagnostics import DIAGNOSTICS, diagnose
    from fastalign.report.state import check_run, state_of

    if args.list:
        for row in DIAGNOSTICS:
            print(f"{row.title} ({row.name})\n  seen as: {row.check.__doc__}\n  to try:  {row.remedy}")
        return 0
    if not args.run:
        raise ConfigError("Which run? Give the folder of a run, or --list")
    folder = check_run(args.run)
    found = diagnose(folder)
    if state := state_of(folder):
        print(state)
    for finding in found:
        print(f"{finding.title} ({finding.name})\n  {printable(finding.evidence)}\n  to try: {finding.remedy}")
    if not found:
        print(f"None of {len(DIAGNOSTICS)} diagnostics fires.")
    return 1 if found else 0
