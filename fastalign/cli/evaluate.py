"""`fastalign eval MODEL --suite FILE...`: what a model gets right, item by item."""

from __future__ import annotations

import argparse
from typing import Any

from fastalign.cli.generate import add_sampling, check_out, check_sampling


def add(commands: Any) -> None:
    """Adds `eval` to the parser's commands."""
    parser = commands.add_parser("eval", help="measure a model on suites of questions, with the result of every item")
    parser.add_argument("model", help="a run folder, or a model as for training")
    parser.add_argument(
        "--suite",
        nargs="+",
        required=True,
        metavar="FILE",
        help="a .jsonl file, or the name of a suite that is shipped",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N items of each suite")
    parser.add_argument("--out", metavar="FILE", help="the .json file for the result of every item (eval.json)")
    parser.add_argument(
        "--unsafe-code", action="store_true", help="run a model's code also where the system cannot lock it in"
    )
    add_sampling(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts that share a batch (default: %(default)s)")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes eval.json if `--out` is given."""
    check_sampling(args)
    check_out(args.out)

    from fastalign.evaluation.run import evaluate
    from fastalign.evaluation.suite import Suite
    from fastalign.files import write_json
    from fastalign.models.runs import load_run

    suites = [Suite.read(path) for path in args.suite]  # before the model: a wrong file must be known at once
    model, tokenizer = load_run(args.model, dtype=args.dtype)
    found = evaluate(
        model, suites, tokenizer, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed,
        batch_size=args.batch_size, plain=args.plain, limit=args.limit, unsafe_code=args.unsafe_code, progress=True,
    )  # fmt: skip
    found["model"] = args.model
    _show(found)
    if args.out:
        write_json(args.out, found)
        print(f"{len(found['items']):,} results written to {args.out}")
    return 0


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastalign.errors import printable

    console = Console(highlight=False, markup=False)
    table = Table(title=printable(found["model"]))
    for i, heading in enumerate(("suite", "items", "right", "95 % interval", "by chance")):
        table.add_column(heading, justify="right" if i else "left")
    for suite, summary in found["suites"].items():
        parts = {key: value for key, value in found["categories"].items() if key.startswith(f"{suite}/")}
        table.add_row(*_cells(suite, summary))
        for name, part in parts.items() if len(parts) > 1 else ():
            table.add_row(*_cells(f"  {name.removeprefix(suite + '/')}", part))
    console.print(table)


def _cells(name: str, summary: dict[str, Any]) -> list[str]:
    from fastalign.errors import printable

    interval = f"{summary['low']:.1%} to {summary['high']:.1%}"
    chance = f"{summary['chance']:.0%}" if summary["chance"] else ""
    return [printable(name), str(summary["items"]), f"{summary['accuracy']:.1%}", interval, chance]
