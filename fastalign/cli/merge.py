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
    parser.add_argument(
        "--requantise", action="store_true",
        help="quantise the merged weights again, as they were in training; the difference to the adapter is printed",
    )  # fmt: skip
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Merges, saves, loads again, and says how far the result is from the model with its adapter."""
    from fastalign.models.merging import merge_run

    merged = merge_run(args.run, args.out, dtype=args.dtype, requantise=args.requantise)
    if not merged.adapter:
        print("The run trained all weights: there is no adapter to merge, and the model is copied.")
    if merged.quantization != "none":
        print(
            f"The adapter was trained on weights in {merged.quantization}: it is merged into their dequantised values"
            + (", and the sum is quantised again." if args.requantise else ".")
        )
    print(
        f"Log-probabilities of {merged.tokens} tokens, loaded again by transformers: they differ by at most "
        f"{merged.largest:.2g} nats per token, {merged.mean:.2g} on average."
    )
    kind = merged.quantization if args.requantise else args.dtype
    print(f"Model in {kind} written to {merged.folder}")
    return 0
