"""`fastalign score MODEL --data FILE`: scores of answers by a reward model, and its accuracy on pairs."""

from __future__ import annotations

import argparse
from typing import Any

from fastalign.cli.generate import check_out


def add(commands: Any) -> None:
    """Adds `score` to the parser's commands."""
    parser = commands.add_parser("score", help="score answers with a reward model, and say how often it is right")
    parser.add_argument("model", help="a run folder of `fastalign reward`, or the folder of a reward model")
    parser.add_argument("--data", required=True, metavar="FILE", help="rows as for training: pairs, or completions")
    parser.add_argument("--out", metavar="FILE", help="the .jsonl file of the scores to write")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: as saved)")
    parser.add_argument("--max-length", type=int, help="leave out rows with more tokens")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Scores every row, and prints what the scores of pairs say of the model."""
    check_out(args.out)

    from fastalign.data.loading import load_rows
    from fastalign.data.tokenization import tokenize
    from fastalign.files import write_jsonl
    from fastalign.rewards.held_out import pair_report
    from fastalign.rewards.model import RewardModel

    given = load_rows(args.data)
    model = RewardModel.load(args.model, dtype=args.dtype)
    tokens, report = tokenize(given, model.tokenizer, max_length=args.max_length, on_truncate="drop")
    scores = model.score(tokens)
    rows: Any = tokens  # datasets annotates a row as a dict or a list
    lengths = [[len(ids) for ids in row["completion_ids"]] for row in rows]
    print(f"{len(rows):,} of {report.rows_in:,} rows scored")
    if all(len(row) == 2 for row in scores):
        chosen, rejected = ([row[i] for row in scores] for i in (0, 1))
        _show(pair_report(chosen, rejected, ([row[0] for row in lengths], [row[1] for row in lengths])))
    else:
        flat = sorted(score for row in scores for score in row)
        print(f"score: mean {sum(flat) / len(flat):.4g}, from {flat[0]:.4g} to {flat[-1]:.4g}")
    if args.out:
        # Rows that were left out or converted have other numbers than those of the file, so the texts go along.
        decode = model.tokenizer.batch_decode
        records = (
            {
                "prompt": decode([row["prompt_ids"]], skip_special_tokens=True)[0],
                "completions": decode(row["completion_ids"], skip_special_tokens=True),
                "scores": values,
            }
            for row, values in zip(rows, scores, strict=True)
        )
        write_jsonl(args.out, records)
        print(f"Scores written to {args.out}")
    return 0


def _show(found: dict[str, Any]) -> None:
    """The report on pairs, a line per number that exists."""
    labels = {
        "accuracy": "the chosen answer has the higher score ({pairs:,} pairs)",
        "accuracy_chosen_longer": "where it is the longer one ({pairs_chosen_longer:,} pairs)",
        "accuracy_chosen_shorter": "where it is the shorter one ({pairs_chosen_shorter:,} pairs)",
        "margin": "mean difference of the scores",
        "length_slope": "change of the score per 100 tokens",
        "ece": "calibration error of the stated probabilities",
        "ece_calibrated": "the same after isotonic calibration",
    }
    for name, label in labels.items():
        if found[name] is not None:
            value = f"{found[name]:.1%}" if name.startswith("accuracy") else f"{found[name]:.4g}"
            print(f"{value:>10}  {label.format(**found)}")
