"""`fastalign data check FILE`: what training would make of a file of rows."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Adds `data check` to the parser's commands."""
    data = commands.add_parser("data", help="look at a data set without training")
    check = data.add_subparsers(title="actions", metavar="ACTION", required=True).add_parser(
        "check", help="print the report that training prints first"
    )
    check.add_argument("file", help="a .jsonl, .json, .parquet or .csv file")
    check.add_argument(
        "--model", default="smollm2-135m-instruct", help="the model whose tokenizer is used (default: %(default)s)"
    )
    check.add_argument(
        "--max-length",
        type=int,
        default=1024,
        help="most tokens of a prompt with a completion (default: %(default)s)",
    )
    check.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Prints the report."""
    from fastalign.data.loading import load_rows
    from fastalign.data.tokenization import tokenize
    from fastalign.models.loading import load_tokenizer

    rows = load_rows(args.file)
    # Rows that training would refuse are dropped here, so that the report can count all of them.
    _, report = tokenize(
        rows, load_tokenizer(args.model), max_length=args.max_length, on_truncate="drop", on_invalid="drop"
    )
    print(report)
    return 0
