"""`fastalign generate RUN`: answers to prompts, one JSON object per line."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from fastalign.errors import ConfigError
from fastalign.files import check_writable


def add(commands: Any) -> None:
    """Adds `generate` to the parser's commands."""
    parser = commands.add_parser("generate", help="answer prompts with the model of a run, or any other")
    parser.add_argument("model", help="a run folder, or a model as for training")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a file of prompts: .txt, one per line, or rows with `prompt`"
    )
    parser.add_argument("--out", metavar="FILE", help="the .jsonl file to write; without it the answers are printed")
    add_sampling(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts that share a batch (default: %(default)s)")
    parser.set_defaults(main=main)


def add_sampling(parser: Any) -> None:
    """Adds what decides how an answer is made, for every command that makes some."""
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens per answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: by machine)")
    parser.add_argument("--plain", action="store_true", help="continue prompts as plain text, without chat template")


def check_sampling(args: argparse.Namespace) -> None:
    """ConfigError for values that cannot work, before anything is loaded."""
    for name in ("max_new_tokens", "batch_size", "limit"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more")
    if not 0 <= args.temperature < float("inf"):
        raise ConfigError(f"temperature is {args.temperature}; it must be 0 or more")


def check_out(path: str | None) -> None:
    """ConfigError if a file cannot be written, which must be known before the answers are made."""
    folder = Path(path or ".").expanduser().parent
    if path and not (folder.is_dir() and os.access(folder, os.W_OK) and not Path(path).is_dir()):
        raise ConfigError(f"--out {path} cannot be written; name a file in a folder that exists")
    if path:
        check_writable("--out's folder", folder)  # a disk may be full


def main(args: argparse.Namespace) -> int:
    """Answers every prompt, in their order."""
    check_sampling(args)
    check_out(args.out)
    if not args.prompt and not args.prompts:
        raise ConfigError("There is no prompt: give --prompt TEXT or --prompts FILE")
    if any(not text.strip() for text in args.prompt or ()):
        raise ConfigError("A --prompt is empty; give some text")

    import torch

    from fastalign.cli.answers import answer_prompts
    from fastalign.data.prompts import Prompt, read_prompts
    from fastalign.files import write_jsonl
    from fastalign.models.runs import load_run

    prompts = [Prompt(text) for text in args.prompt or ()]
    prompts += read_prompts(args.prompts) if args.prompts else []
    torch.manual_seed(args.seed)
    answers = answer_prompts(*load_run(args.model, dtype=args.dtype), prompts, args, label="answers")
    records = [
        {"prompt": prompt.content, "answer": text, "tokens": length, "finished": finished}
        for prompt, text, length, finished in zip(
            prompts, answers.texts, answers.lengths, answers.finished, strict=True
        )
    ]
    if args.out:
        write_jsonl(args.out, records)
        print(f"{len(records)} answers written to {args.out}")
    else:
        for record in records:
            print(json.dumps(record))  # ASCII: what a model wrote cannot steer the terminal
    return 0
