"""`fastalign merge RUN --out DIR`: the run's model without an adapter, for every program that loads models."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from fastalign.errors import ConfigError


def add(commands: Any) -> None:
    """Adds `merge` to the parser's commands."""
    parser = commands.add_parser("merge", help="write a run's adapter into its weights, as a plain model")
    parser.add_argument("run", help="a run folder, or the folder of an adapter")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make; it must not hold anything")
    parser.add_argument(
        "--dtype", default="float32", help="of the saved weights: float32, bfloat16, float16 (default: %(default)s)"
    )
    parser.add_argument(
        "--gguf", metavar="FILE", help="not written here: says how llama.cpp makes it of the merged model"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Merges, saves, loads again, and says how far the result is from the model with its adapter.

    Raises:
        ConfigError: A GGUF is asked for. llama.cpp's converter knows every architecture and tokenizer, so it is named.
    """
    if args.gguf:
        out, file = shlex.quote(args.out), shlex.quote(args.gguf)
        raise ConfigError(
            f"--gguf is {args.gguf!r}, but fastalign writes no GGUF: merge without --gguf, then let llama.cpp convert "
            "the folder, by `git clone https://github.com/ggml-org/llama.cpp`, `pip install -r "
            f"llama.cpp/requirements.txt` and `python llama.cpp/convert_hf_to_gguf.py {out} --outfile {file} "
            "--outtype bf16`"
        )
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
