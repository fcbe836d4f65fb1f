"""Writes the prompts of the recipe grpo-sums: all sums of two digits from 1 to 9, in two files.

`3 + 4` and `4 + 3` lie in the same file: a model that learns one of them would otherwise have seen the other.

    python -m fastalign.recipes.sums.make_data
"""

from __future__ import annotations

import random
from itertools import combinations_with_replacement
from pathlib import Path

from fastalign.files import write_jsonl

FOLDER = Path(__file__).parent.parent / "grpo-sums"
_HELD_OUT = 12  # pairs of digits


def rows(pairs: list[tuple[int, int]]) -> list[dict]:
    """The sums of some pairs of digits, in both orders."""
    both = [order for a, b in pairs for order in dict.fromkeys([(a, b), (b, a)])]
    return [{"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)} for a, b in both]


def main() -> None:
    """Writes train.jsonl and test.jsonl into the recipe's folder."""
    pairs = list(combinations_with_replacement(range(1, 10), 2))
    random.Random(0).shuffle(pairs)
    write_jsonl(FOLDER / "test.jsonl", rows(pairs[:_HELD_OUT]))
    write_jsonl(FOLDER / "train.jsonl", rows(pairs[_HELD_OUT:]))


if __name__ == "__main__":
    main()
