"""`fastalign fisher MODEL`: how much each weight matters to some text, for EWC."""

from __future__ import annotations

import argparse
from typing import Any

from fastalign.errors import ConfigError


def add(commands: Any) -> None:
    """Adds `fisher` to the parser's commands."""
    fisher = commands.add_parser("fisher", help="compute how much each weight matters to some text, for EWC")
    fisher.add_argument("model", help="a folder, a .gguf file, a packaged model, or organisation/name")
    fisher.add_argument("--text", nargs="+", required=True, metavar="FILE", help=".txt, or rows of text or messages")
    fisher.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write")
    fisher.add_argument("--length", type=int, default=512, help="most tokens of a window (default: %(default)s)")
    fisher.add_argument("--estimator", default="empirical", help="empirical, sampled or batch (default: %(default)s)")
    fisher.add_argument("--per", default="sequence", help="sequence or token (default: %(default)s)")
    fisher.add_argument("--seed", type=int, default=0, help="seed of the random draws (default: %(default)s)")
    fisher.add_argument("--bits", type=int, default=32, help="bits of each value: 32 or 8 (default: %(default)s)")
    fisher.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Computes the Fisher information and writes it.

    Raises:
        ConfigError: The length or the number of bits is out of range.
    """
    if args.length < 2 or args.bits not in (8, 32):
        raise ConfigError(f"length is {args.length} and bits {args.bits}; they must be 2 or more, and 8 or 32")

    import torch

    from fastalign.data.text import text_windows
    from fastalign.fisher.diagonal import fisher_diagonal
    from fastalign.models.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(args.model)
    rows = [row for name in args.text for row in text_windows(name, tokenizer, length=args.length)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, for_adapter=False)
    model.to(device)  # pyright: ignore[reportArgumentType]  # the type is lost in transformers' wrapper of `to`
    fisher = fisher_diagonal(model, rows, estimator=args.estimator, per=args.per, seed=args.seed)
    fisher.save(args.out, bits=args.bits)
    squared = "batches" if args.estimator == "batch" else "tokens" if args.per == "token" else "windows"
    print(f"Fisher information of {len(fisher)} tensors from {fisher.samples} {squared} written to {args.out}")
    return 0
