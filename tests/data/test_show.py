"""Rows as they are trained. That rows are understood in every layout is tested in test_layouts.py."""

from fastalign.data import tokenize
from fastalign.data.show import trained_parts


def test_scored_parts_are_told_apart(byte_level):
    tokenizer = byte_level()
    turns = [{"role": role, "content": text} for role, text in (
        ("user", "hello"), ("assistant", "fine \N{SNOWMAN}"), ("user", "and?"), ("assistant", "ok"))]  # fmt: skip
    tokens, _ = tokenize([{"messages": turns}], tokenizer)
    assert trained_parts(tokens[0], tokenizer) == {
        "prompt": [("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", False)],
        "completion": [
            ("fine \N{SNOWMAN}<|im_end|>", True),
            ("\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n", False),
            ("ok<|im_end|>", True),
        ],
    }
    pair, _ = tokenize([{"prompt": "a", "chosen": " b", "rejected": " c"}], tokenizer)
    assert {*trained_parts(pair[0], tokenizer)} == {"prompt", "chosen", "rejected"}


def test_the_first_token_without_a_prompt_is_not_scored(metaspace):
    tokenizer = metaspace()
    tokens, _ = tokenize([{"text": "what is it"}], tokenizer)
    parts = trained_parts(tokens[0], tokenizer)["completion"]
    assert [scored for _, scored in parts] == [False, True]
    assert "".join(text for text, _ in parts) == tokenizer.decode(tokens[0]["completion_ids"][0])
