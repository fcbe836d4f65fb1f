"""What a prompt must leave room for. The answers themselves are in test_generate.py."""

from __future__ import annotations

from argparse import Namespace

import pytest

from fastalign.cli.answers import answer_prompts
from fastalign.data.prompts import Prompt
from fastalign.errors import DataError


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "Prompt 2 has no tokens"), ("word " * 300, r"Prompt 2 has 1,500 tokens, and the model has 256 positions")],
)
def test_prompts_without_tokens_or_room_are_named_by_their_number(tiny_llama, tokenizer, text, said):
    args = Namespace(plain=True, max_new_tokens=4, batch_size=2, temperature=0.0)
    with pytest.raises(DataError, match=said):
        answer_prompts(tiny_llama(), tokenizer, [Prompt("good"), Prompt(text)], args, label="answers")
