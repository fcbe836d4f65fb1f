"""Prompts alone are tokenised as they are beside an answer, and keep the number of their row."""

from __future__ import annotations

import pytest

from fastalign.data.prompt_rows import tokenize_prompts
from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError

OPTIONS = {"max_prompt_length": None, "on_truncate": "error"}


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_are_those_of_rows_with_answers(tokenizer, chat):
    prompts = [[{"role": "user", "content": text}] if chat else text for text in ("What?", "And why?")]
    answers = [[{"role": "assistant", "content": "b"}] if chat else "b"] * 2
    full, _ = tokenize([{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)], tokenizer)
    found, given, _ = tokenize_prompts([{"prompt": p, "extra": i} for i, p in enumerate(prompts)], tokenizer, **OPTIONS)
    assert found["prompt_ids"][:] == full["prompt_ids"][:] and found["row"][:] == [0, 1]
    assert given["extra"][:] == [0, 1]


def test_long_prompts_are_refused_or_left_out_by_their_own_length(tokenizer):
    rows = [{"prompt": "a" * n} for n in (3, 9, 5)]
    options = {"max_prompt_length": 5}
    assert tokenize_prompts(rows, tokenizer, on_truncate="drop", **options)[0]["row"][:] == [0, 2]
    with pytest.raises(DataError, match="more than 5 tokens"):
        tokenize_prompts(rows, tokenizer, on_truncate="error", **options)


def test_rows_without_prompts(tokenizer):
    with pytest.raises(DataError, match="no column 'prompt', only question"):
        tokenize_prompts([{"question": "a"}], tokenizer, **OPTIONS)
