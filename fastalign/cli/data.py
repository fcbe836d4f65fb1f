"""`fastalign data check FILE`: what training would make of a file of rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastalign.errors import ConfigError

ITEMS_SHOWN = 20  # of a suite that are in the rows
SHOWN_CHARACTERS = 1200  # of a part of a row; the middle of a longer one is left out


def add(commands: Any) -> None:
    """Adds `data check` to the parser's commands."""
    data = commands.add_parser("data", help="look at a data set without training")
    check = data.add_subparsers(title="actions", metavar="ACTION", required=True).add_parser(
        "check", help="print the report that training prints first, and rows as they are trained"
    )
    check.add_argument(
        "file", nargs="+", help="files or folders (.jsonl, .json, .csv, .tsv, .parquet), or hub:owner/name"
    )
    check.add_argument(
        "--model", default="smollm2-135m-instruct", help="the model whose tokenizer is used (default: %(default)s)"
    )
    check.add_argument(
        "--max-length",
        type=int,
        default=1024,
        help="most tokens of a prompt with a completion (default: %(default)s)",
    )
    check.add_argument(
        "--for", dest="wanted", choices=("pairs", "labelled", "completions"),
        help="what the rows are for: pairs (dpo), labelled (kto, bco) or completions (sft, distill)",
    )  # fmt: skip
    check.add_argument(
        "--columns", nargs="+", default=[], metavar="FIELD=COLUMN", help="which columns hold what, as prompt=question"
    )
    check.add_argument("--rows", type=int, default=2, help="how many rows are shown (default: %(default)s)")
    check.add_argument("--out", metavar="FILE", help="a .jsonl file for the rows as they were understood")
    check.add_argument(
        "--against", nargs="+", default=[], metavar="SUITE", help="suites whose items must not be among the rows"
    )
    check.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Prints the report and some rows. With --against, the exit status is 1 if a suite is contaminated."""
    columns = dict(_column(word) for word in args.columns)
    if args.out and Path(args.out).suffix != ".jsonl":
        raise ConfigError(f"--out is {args.out!r}: name a .jsonl file")

    from rich.console import Console

    from fastalign.data.loading import load_rows
    from fastalign.data.tokenization import tokenize
    from fastalign.models.loading import load_tokenizer

    suites = _suites(args.against)
    rows = load_rows(args.file if len(args.file) > 1 else args.file[0], columns)
    tokenizer = load_tokenizer(args.model)
    # Rows that training would refuse are dropped here, so that the report can count all of them.
    tokens, report = tokenize(
        rows, tokenizer, max_length=args.max_length, on_truncate="drop", on_invalid="drop", wanted=args.wanted
    )
    print(report)
    console = Console(highlight=False, soft_wrap=True)
    for number in range(min(args.rows, len(tokens))):
        _show(console, number + 1, tokens[number], tokenizer)
    if args.out:
        _write(rows, args.wanted, Path(args.out))
    return _contamination(rows, suites) if suites else 0


def _suites(names: list[str]) -> list[Any]:
    if not names:
        return []
    from fastalign.evaluation.suite import Suite

    return [Suite.read(name) for name in names]


def _contamination(rows: Any, suites: list[Any]) -> int:
    """Prints which items of suites are among the rows. 1 if there are too many, else 0."""
    from fastalign.errors import printable
    from fastalign.evaluation.contamination import check_contamination
    from fastalign.evaluation.ngrams import row_text

    found = check_contamination([row_text(row) for row in rows.to_list()], suites)
    for name, suite in found["suites"].items():
        short, near = len(suite["not_checkable"]), suite["rephrased"]
        print(
            f"\nSuite {printable(name)}: {len(suite['verbatim'])} of {suite['items'] - short} items are in the rows "
            f"word by word ({suite['share']:.1%}, at most 1 % is accepted), and {len(near)} may be rephrased "
            f"(about 1 % by mistake). {short} items are too short to check."
        )
        for kind, value in (("verbatim", "overlap"), ("rephrased", "similarity")):
            for item in suite[kind][:ITEMS_SHOWN]:
                print(f"  {kind}: item {printable(item['id'])} in row {item['text'] + 1} ({value} {item[value]:.2f})")
            if (more := len(suite[kind]) - ITEMS_SHOWN) > 0:
                print(f"  {kind}: {more} more")
    print("\nContaminated: leave those rows out." if found["contaminated"] else "\nNot contaminated.")
    return int(found["contaminated"])


def _column(word: str) -> tuple[str, str]:
    field, equals, column = word.partition("=")
    if not equals or not field or not column:
        raise ConfigError(f"--columns has {word!r}: write FIELD=COLUMN, as prompt=question")
    return field, column


def _show(console: Any, number: int, row: dict, tokenizer: Any) -> None:
    """One row as it is trained: scored parts in colour on a terminal, in double brackets elsewhere."""
    from rich.text import Text

    from fastalign.data.show import trained_parts

    label = f", label {str(row['label']).lower()}" if "label" in row else ""
    how = "what is scored is in colour" if console.is_terminal else "what is scored is in [[ ]]"
    console.print(Text(f"\nRow {number}{label}: {how}", style="bold"))
    for name, parts in trained_parts(row, tokenizer).items():
        text = Text(f"  {name}: ")
        for whole, scored in parts:
            part = _short(whole)
            if console.is_terminal:
                text.append(part, style="bold green" if scored else "dim")
            else:
                text.append(f"[[{part}]]" if scored else part)
        console.print(text)


def _short(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]} ... ({left_out:,} characters) ... {text[-half:]}"


def _write(rows: Any, wanted: str | None, path: Path) -> None:
    import json

    from fastalign.data.show import understood_rows
    from fastalign.files import write_text

    lines = [json.dumps(row, ensure_ascii=False) for row in understood_rows(rows, wanted)]
    write_text(path, "".join(line + "\n" for line in lines))
    print(f"\n{len(lines):,} rows written to {path}")
