"""`fastalign merge RUN --out DIR`: the run's model without an adapter, for every program that loads models."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Adds `merge` to the parser's commands."""
    parser = commands.add_parser("merge", help="write a run's adapter into its weights, as a plain model")
    parser.add_argument("run", help="a run folder, or the folder of an adapter")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make; it must not hold anything")
    parser.add_argument(
        "--dtype", default="float32", help="of the saved weights: float32, bfloat16, float16 (default: %(default)s)"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Merges, saves, loads again, and says how far the result is from the model with its adapter."""
    from pathlib import Path

    from fastalign.files import read_json
    from fastalign.models.merging import merge_run

    merged = merge_run(args.run, args.out, dtype=args.dtype)
    if not merged.adapter:
        print("The run trained all weights: there is no adapter to merge, and the model is copied.")
    quantization = read_json(Path(args.run) / "run.json").get("quantization", "none")
    if quantization != "none":
        print(
            f"The adapter was trained on weights in {quantization}. It is merged into the weights before rounding, with"
            " which it computes slightly different answers; the difference below is to these weights with the adapter."
        )
    print(
        f"Log-probabilities of {merged.tokens} tokens, loaded again by transformers: they differ by at most "
        f"{merged.largest:.2g} nats per token, {merged.mean:.2g} on average."
    )
    print(f"Model in {args.dtype} written to {merged.folder}")
    return 0
