"""Prompts: what a file gives, and the same tokens that training starts answers from."""

from __future__ import annotations

import json

import pytest

from fastalign.data.prompts import Prompt, encode_prompt, read_prompts
from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError


def test_tokens_are_those_of_training(tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
    answer = [{"role": "assistant", "content": "Yes."}]
    rows, _ = tokenize([{"prompt": turns, "completion": answer}], tokenizer)
    assert encode_prompt(Prompt(turns), tokenizer) == rows[0]["prompt_ids"]
    rows, _ = tokenize([{"prompt": "Is it?", "completion": "Yes."}], tokenizer)
    assert encode_prompt(Prompt("Is it?"), tokenizer, plain=True) == rows[0]["prompt_ids"]
    assert encode_prompt(Prompt("Is it?"), tokenizer) == encode_prompt(Prompt(turns[1:]), tokenizer)


def test_a_file_s_columns(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "2 + 2?", "answer": "4", "system": "Count."}) + "\n")
    (prompt,) = read_prompts(file)
    assert [turn["role"] for turn in prompt.content] == ["system", "user"]
    assert (prompt.question, prompt.row["answer"]) == ("2 + 2?", "4")
    file.write_text(json.dumps({"messages": [{"role": "assistant", "content": "Hi"}]}) + "\n")
    with pytest.raises(DataError, match="Row 1: the prompt in column 'messages' is empty"):
        read_prompts(file)


def test_messages_need_a_template(tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(Prompt([{"role": "user", "content": "a"}]), bare)
    assert encode_prompt(Prompt("a"), bare) == encode_prompt(Prompt("a"), tokenizer, plain=True)
    with pytest.raises(DataError, match="'tools'"):
        encode_prompt(Prompt([{"role": "user", "content": "a"}], {"tools": '{"a": 1}'}), tokenizer)
