"""Text as windows of tokens."""

from __future__ import annotations

import json

import pytest

from fastalign.data.text import text_windows
from fastalign.errors import DataError


def ids(windows):
    return [[*w["prompt_ids"], *w["completion_ids"][0]] for w in windows]


def test_a_long_text_is_cut_and_nothing_is_lost(tokenizer):
    text = "".join(chr(97 + i % 26) for i in range(100))
    windows = text_windows([{"text": text}], tokenizer, length=32)
    assert [len(row) for row in ids(windows)] == [32, 32, 32, 5]  # EOS is the last
    tokens = [token for row in ids(windows) for token in row]
    assert tokenizer.decode(tokens[:-1]) == text and tokens[-1] == tokenizer.eos_token_id


def test_every_window_begins_with_bos_where_the_tokenizer_puts_one(tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    with_bos = deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    windows = text_windows([{"text": "x" * 70}], with_bos, length=32)
    assert [row[0] for row in ids(windows)] == [1, 1, 1]
    assert [len(row) for row in ids(windows)] == [32, 32, 10]


def test_files_of_text_and_of_rows(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("A text,\nof two lines.")
    assert tokenizer.decode(ids(text_windows(tmp_path / "a.txt", tokenizer))[0][:-1]) == "A text,\nof two lines."
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "Say", "completion": " it."}) + "\n")
    (row,) = text_windows(str(tmp_path / "b.jsonl"), tokenizer)
    assert (len(row["prompt_ids"]), len(row["completion_ids"][0])) == (3, 5)


def test_a_byte_order_mark_is_no_token(tokenizer, tmp_path):
    """Windows editors put one at the head of a UTF-8 file."""
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfA text.")
    (tmp_path / "plain.txt").write_bytes(b"A text.")
    marked, plain = (text_windows(tmp_path / name, tokenizer) for name in ("marked.txt", "plain.txt"))
    assert marked == plain
    assert ids(plain)[0][0] == tokenizer("A")["input_ids"][0]


def test_masks_are_cut_with_their_tokens(tokenizer):
    talk = [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b" * 40}]
    talk += [{"role": "user", "content": "c" * 40}, {"role": "assistant", "content": "d" * 40}]
    windows = text_windows([{"messages": talk}], tokenizer, length=140)
    scored = []
    for window in windows:
        pairs = zip(window["completion_ids"][0], window["completion_mask"][0], strict=True)
        scored += [token for token, kept in pairs if kept]
    assert tokenizer.decode(scored).replace("<|im_end|>", "") == "b" * 40 + "d" * 40


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "not text"),
        ([{"prompt": "a", "completion": "b", "label": True}], "not text"),
        ([{"prompt": "a" * 50, "completion": "b"}], "more than 16 tokens"),
        ("nowhere.txt", "cannot be read"),
        ("empty.txt", "is empty"),
        ("latin.txt", "not UTF-8"),
    ],
)
def test_what_is_not_text_is_refused(tokenizer, tmp_path, rows, said):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError) as error:
        text_windows(tmp_path / rows if isinstance(rows, str) else rows, tokenizer, length=32)
    assert said in str(error.value) and "\n" not in str(error.value)
