"""`fastalign plan CONFIG`: the memory that a run will need, part by part, and what to change where it does not fit."""

from __future__ import annotations

import argparse
from typing import Any

from fastalign.cli import configuration
from fastalign.cli.memory_limit import describe, in_gb, remedy, settings
from fastalign.cli.train import check
from fastalign.memory import parts, planning
from fastalign.memory.planning import Choice
from fastalign.memory.shapes import Shapes


def add(commands: Any) -> None:
    """Adds `plan` to the parser's commands."""
    parser = commands.add_parser("plan", help="say what memory a run needs, without loading the model")
    parser.add_argument("config", help="a recipe, or a YAML file of options")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options that replace those of the file")
    parser.add_argument("--memory", metavar="SIZE", help="choose the fastest way that fits, such as 16GB")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of the longest micro-batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what to plan for; the default is what is here")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Prints the plan.

    Returns:
        0: it fits, or there is no limit. 1: it does not fit. What cannot be planned raises, which is 2.
    """
    options = {**configuration.read_recipe(args.config), **configuration.read_arguments(args.options)}
    run, of_method, row = check(options)
    shapes, setting, rows = settings(run, of_method, row, tokens=args.tokens, device=args.device)
    text = args.memory or run.memory_limit
    limit = None if text is None else planning.parse_size("--memory" if args.memory else "memory_limit", text)
    setting = setting._replace(bounded=limit is not None and setting.device == "cpu")
    _show(shapes, setting)
    return 0 if limit is None else _show_choice(shapes, setting, rows, limit)


def _show(shapes: Shapes, setting: parts.Setting) -> None:
    found = parts.parts(shapes, setting)
    where = {"cpu": "CPU", "cuda": "GPU"}[setting.device]
    print(f"Peak on the {where} at {setting.tokens:,} tokens per micro-batch, {shapes.parameters:,} parameters:")
    for name, size in found.items():
        if size:
            print(f"  {name:<24}{size / 1e9:>9.3f} GB")
    print(f"  {'sum':<24}{sum(found.values()) / 1e9:>9.3f} GB")


def _show_choice(shapes: Shapes, setting: parts.Setting, rows: int, limit: int) -> int:
    """Prints the fastest way that fits, and why the others lost; returns the exit status."""
    choices = planning.alternatives(shapes, setting, rows)
    chosen = planning.choose(choices, limit)
    if chosen is None:
        over = planning.peak(shapes, setting) - limit
        print(f"Does not fit in {in_gb(limit)}, by {in_gb(over)}: {remedy(shapes, setting, rows, limit)}")
        return 1
    print(f"Fits in {in_gb(limit)}: {describe(chosen, setting, rows)}, {in_gb(chosen.peak)}.")
    if setting.bounded:
        print("  (set memory_limit in the configuration: without it the allocator keeps freed memory)")
    for choice in choices:
        if choice is not chosen:
            lost = f"{in_gb(choice.peak - limit)} too much" if choice.peak > limit else _slower(choice, chosen)
            print(f"  not {describe(choice, setting, rows)}: {lost}")
    return 0


def _slower(choice: Choice, chosen: Choice) -> str:
    return f"fits, but is estimated to take {choice.cost / chosen.cost:.2f}x the time"
