"""`fastalign tax BASE TUNED`: what tuning changed in a model, token by token, on any text."""

from __future__ import annotations

import argparse
from typing import Any

from fastalign.errors import ConfigError
from fastalign.files import check_writable


def add(commands: Any) -> None:
    """Adds `tax` to the parser's commands."""
    tax = commands.add_parser("tax", help="show what tuning changed in a model, token by token, on any text")
    tax.add_argument("base", help="the model before: a folder, a .gguf file, a packaged model, or organisation/name")
    tax.add_argument("tuned", help="the model after: a folder of it, or a run folder with an adapter or a whole model")
    tax.add_argument("--text", nargs="+", required=True, metavar="FILE", help=".txt, or rows of text or messages")
    tax.add_argument("--out", metavar="DIR", help="the folder in which tax.json and tax.html are written")
    tax.add_argument("--length", type=int, default=512, help="most tokens of a window (default: %(default)s)")
    tax.add_argument("--max-tokens", type=int, metavar="N", help="use only the first N tokens of each file")
    tax.add_argument(
        "--dtype", default="auto", help="type of the weights: float32, bfloat16, float16 (default: by machine)"
    )
    tax.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes the pages if `--out` is given.

    Raises:
        ConfigError: A number of tokens is below 2.
    """
    for name in ("length", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 2:
            raise ConfigError(f"{name} is {value}; it must be 2 or more")

    if args.out:
        check_writable("--out", args.out)  # before the long measurement

    from fastalign.evaluation.tax import measure_tax
    from fastalign.report.tax import show_tax, write_tax

    found = measure_tax(
        args.base, args.tuned, args.text, length=args.length, max_tokens=args.max_tokens, dtype=args.dtype
    )
    show_tax(found)
    if args.out:
        print(f"Written to {write_tax(found, args.out)}")
    return 0
