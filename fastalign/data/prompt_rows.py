"""Rows of prompts alone, for methods whose answers are sampled."""

from __future__ import annotations

from functools import partial
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from fastalign.data.loading import Rows, load_rows
from fastalign.data.numbers import with_numbers
from fastalign.data.report import DataReport
from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError

_ANSWER = "."  # stands for the answer that will be sampled


def tokenize_prompts(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int | None, on_truncate: Any, **options: Any
) -> tuple[datasets.Dataset, datasets.Dataset, DataReport]:
    """Tokenises prompts as a model sees them before it answers: of chat messages with the generation prompt.

    Args:
        rows: Anything that `load_rows` takes, with a column `prompt` of texts or chat messages. Other columns are kept
            as they are, for reward functions.
        tokenizer: A transformers tokenizer.
        max_prompt_length: The most tokens of a prompt; None: no limit.
        on_truncate: As for `tokenize`.
        **options: `on_invalid` and `apply_chat_template` of `tokenize`.

    Returns:
        - The tokenised rows: `prompt_ids`, `completion_ids` with a placeholder, and `row`, the number of the row.
        - The rows as they were given, by that number.
        - The report.

    Raises:
        DataError: There is no column `prompt`, or the rows cannot be used.
    """
    given = load_rows(rows).with_format(None)
    if "prompt" not in given.column_names:
        raise DataError(
            f"The rows have no column 'prompt', only {', '.join(given.column_names)}: rename it, or set columns: "
            "{prompt: NAME}"
        )
    prompts = given["prompt"][:]
    chat = bool(prompts) and isinstance(prompts[0], list)
    answer = [{"role": "assistant", "content": _ANSWER}] if chat else _ANSWER
    texts = datasets.Dataset.from_dict(
        {"prompt": prompts, "completion": [answer] * len(prompts), "row": list(range(len(prompts)))}
    )
    options = {"wanted": "completions", **options}
    placeholder = 0
    if max_prompt_length is not None and len(texts):
        first, _ = tokenize(texts.select([0]), tokenizer, **options)
        placeholder = len(first[0]["completion_ids"][0])
        options["max_length"] = max_prompt_length + placeholder
    try:
        work = partial(tokenize, tokenizer=tokenizer, on_truncate=on_truncate, **options)
        tokens, report = with_numbers(texts, work, ["row"])
    except DataError as error:
        if "longer than max_length" not in str(error):
            raise
        raise DataError(
            f"Some prompts have more than {max_prompt_length:,} tokens, which is max_length less "
            "max_completion_length: raise max_length, or set on_truncate to drop or keep_end."
        ) from error
    return tokens.remove_columns("row").add_column("row", list(map(int, tokens["row"]))), given, report
