"""The reward of the recipe grpo-sums: whether an answer gives the right sum."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"\d+")


def right_sum(prompts: list, completions: list, answer: list, **columns: Any) -> list[float]:
    """1 where the last number of a completion is the row's `answer`, else 0.

    Args:
        prompts: Not read.
        completions: Texts, or chats of one message.
        answer: The sums.
        columns: Not read.

    Returns:
        One number per completion.
    """
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    numbers = [_NUMBER.findall(text) for text in texts]
    return [float(bool(found) and int(found[-1]) == int(sum_)) for found, sum_ in zip(numbers, answer, strict=True)]
