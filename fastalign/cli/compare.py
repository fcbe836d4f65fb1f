"""`fastalign compare A B --prompts FILE`: the answers of two models side by side, and which wins by a rule."""

from __future__ import annotations

import argparse
from typing import Any

from fastalign.cli.generate import add_sampling, check_out, check_sampling

SHOWN = 3  # pairs of answers on the terminal


def add(commands: Any) -> None:
    """Adds `compare` to the parser's commands."""
    parser = commands.add_parser("compare", help="put answers of two models side by side, and count wins by a rule")
    parser.add_argument("first", help="a run folder, or a model as for training")
    parser.add_argument("second", help="the other one")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="a file of prompts, as `generate` takes it")
    parser.add_argument(
        "--rule", action="append", help="shorter, longer, contains:TEXT, regex:PATTERN or answer; may be repeated"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N prompts")
    parser.add_argument("--out", metavar="FILE", help="the .json file with every answer and verdict")
    add_sampling(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts that share a batch (default: %(default)s)")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Answers with both models, one after the other, and prints who wins."""
    check_sampling(args)
    check_out(args.out)

    from fastalign.data.prompts import read_prompts
    from fastalign.evaluation.rules import compare_answers, read_rule
    from fastalign.files import write_json

    rules = args.rule or ["shorter"]
    prompts = read_prompts(args.prompts)[: args.limit]
    for rule in rules:  # a rule that cannot be used must be known before the answers are made
        score = read_rule(rule)
        for prompt in prompts:
            score("", prompt.row)
    answers = [_answers(name, prompts, args, label) for name, label in ((args.first, "first"), (args.second, "second"))]
    (first, second), asked = (model.texts for model in answers), [prompt.row for prompt in prompts]
    results = [compare_answers(first, second, asked, rule) for rule in rules]
    _show(args, prompts, answers, results)
    if args.out:
        rows = [
            {"prompt": prompt.content, "first": a, "second": b, **{r["rule"]: r["verdicts"][i] for r in results}}
            for i, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True))
        ]
        totals = [{key: value for key, value in result.items() if key != "verdicts"} for result in results]
        write_json(args.out, {"first": args.first, "second": args.second, "rules": totals, "answers": rows})
        print(f"Written to {args.out}")
    return 0


def _answers(name: str, prompts: Any, args: argparse.Namespace, label: str) -> Any:
    """The answers of one model, which is given up before the next one is loaded."""
    import torch

    from fastalign.cli.answers import answer_prompts
    from fastalign.models.runs import load_run

    torch.manual_seed(args.seed)
    return answer_prompts(*load_run(name, dtype=args.dtype), prompts, args, label=f"{label} model")


def _show(args: argparse.Namespace, prompts: Any, answers: Any, results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastalign.errors import printable
    from fastalign.report.rendering import format_number

    console = Console(highlight=False, markup=False)
    for i, prompt in enumerate(prompts[:SHOWN]):
        console.print(f"\n{printable(prompt.question)}", style="bold")
        for name, model in zip(("first", "second"), answers, strict=True):
            console.print(f"   {name:<7}({model.lengths[i]} tokens): {printable(model.texts[i])}")
    console.print(f"\nfirst: {args.first}\nsecond: {args.second}\n{len(prompts)} prompts", end="")
    console.print(f", of which {len(prompts[:SHOWN])} are shown")
    table = Table()
    for i, heading in enumerate(("rule", "first wins", "second wins", "ties", "win rate of the second", "p")):
        table.add_column(heading, justify="right" if i else "left")
    for result in results:
        counts = [str(result[key]) for key in ("first", "second", "ties")]
        table.add_row(result["rule"], *counts, f"{result['win_rate']:.0%}", format_number(result["p_value"]))
    console.print(table)
    console.print("A tie counts half in the win rate. p: exact sign test of the prompts that are no tie.")
