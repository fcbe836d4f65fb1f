"""Files and rows that are damaged in every way: each is read, or refused by an error of ours. Good ones come back."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from comparing import Draw, Wrong
from hypothesis import strategies as st

from fastalign.data import load_rows, tokenize
from fastalign.errors import DataError

_NAMES = (
    "prompt", "chosen", "rejected", "completion", "label", "messages", "text", "system", "question", "instruction",
    "input", "output", "conversations", "tools", "images", "weight", "a", "", "\ud83d\ude00", "columns",
)  # fmt: skip
_TEXT = st.one_of(
    st.text(max_size=12), st.sampled_from(["hi", "A: B", "\ufeff", "\x00", "a\u2028b", "{}", "[]", "nan", "=1"])
)
_NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none())
_TURN = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "human"]), _TEXT), "content": _TEXT},
    optional={"tool_calls": st.lists(st.dictionaries(_TEXT, _TEXT, max_size=2), max_size=2), "name": _TEXT},
)
_VALUE = st.recursive(
    st.one_of(_TEXT, _NUMBERS, st.lists(_TURN, max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_TEXT, inner, max_size=3)),
    max_leaves=6,
)
_ROW = st.dictionaries(st.sampled_from(_NAMES), _VALUE, max_size=5)


def _damaged(draw: Draw, content: bytes) -> bytes:
    """The bytes of a file with one of the faults that files have."""
    how = draw.one("not", "cut", "flip", "insert", "twice", "bom", "utf16", "null", "crlf", "huge")
    place = draw.integer(0, len(content))
    if how == "cut":
        return content[:place]
    if how == "flip" and place < len(content):
        return content[:place] + bytes([content[place] ^ draw.one(1, 128, 255)]) + content[place + 1 :]
    if how == "insert":
        return (
            content[:place]
            + draw.one(b"\xff", b"\x00", b"{", b'"', b"\n", b"\\u12", b",", b"\xed\xa0\x80", b"1e999")
            + content[place:]
        )
    if how == "utf16":
        return content.decode(errors="replace").encode("utf-16")
    faults = {
        "twice": content + content,
        "bom": b"\xef\xbb\xbf" + content,
        "null": content + b"\nnull\n",
        "crlf": content.replace(b"\n", b"\r\n"),
    }
    return b'{"prompt": "' + b"x" * 300_000 + b'"}\n' + content if how == "huge" else faults.get(how, content)


def files(draw: Draw) -> None:
    """JSONL, JSON, CSV and Parquet whose bytes were damaged."""
    rows = draw.data.draw(st.lists(_ROW, max_size=4))
    kind = draw.one(".jsonl", ".json", ".csv", ".parquet", ".txt")
    text = json.dumps(rows) if kind == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    if kind == ".csv":
        names = list(rows[0]) if rows else ["prompt", "chosen"]
        text = ",".join(map(str, names)) + "\n" + "".join(",".join(str(v) for v in row.values()) + "\n" for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{kind}"
        path.write_bytes(_damaged(draw, text.encode(errors="replace")))
        load_rows(path)


def written_rows(draw: Draw) -> None:
    """Rows of plain text come back from a file as they were written."""
    names = draw.data.draw(st.lists(st.sampled_from(["prompt", "chosen", "rejected", "text"]), min_size=1, unique=True))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    rows = draw.data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, text)), min_size=1, max_size=5))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / draw.one("rows.jsonl", "rows.json")
        ascii_only, lines = draw.flag(), path.suffix == ".jsonl"
        dump = functools.partial(json.dumps, ensure_ascii=ascii_only)
        path.write_text("".join(dump(row) + "\n" for row in rows) if lines else dump(rows), encoding="utf-8")
        found = list(load_rows(path))
    if found != rows:
        raise Wrong(f"rows {rows} came back as {found}")


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<start>", "<end>")
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<start>' + m['role'] + '\n' + m['content'] + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
    )
    return tokenizer


def tokenized_rows(draw: Draw) -> None:
    """Rows from Python with wrong types, nulls and unknown columns; what is scored of good ones is what they say."""
    rows = draw.data.draw(st.lists(_ROW, min_size=1, max_size=3))
    shape = draw.one("any", "pairs", "completion", "messages", "text")
    if shape != "any":
        word = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
        fields = {"pairs": ("prompt", "chosen", "rejected"), "completion": ("prompt", "completion"), "text": ("text",)}
        row = dict.fromkeys(fields.get(shape, ()), word)
        if shape == "messages":
            turns = [
                {"role": "user", "content": draw.data.draw(word)},
                {"role": "assistant", "content": draw.data.draw(word)},
            ]
            rows = [{"messages": turns}]
        else:
            rows = draw.data.draw(st.lists(st.fixed_dictionaries(row), min_size=1, max_size=3))
    tokenizer = _tokenizer()
    try:
        found, _ = tokenize(
            rows,
            tokenizer,
            max_length=draw.one(None, 64, 2),
            on_truncate=draw.one("error", "drop", "keep_end"),
            on_invalid=draw.one("error", "drop"),
        )
    except DataError:
        return
    if shape == "completion":
        texts = {row["completion"] for row in rows}
        for row in found:
            said = tokenizer.decode(row["completion_ids"][0]).removesuffix("<end>")
            if said not in texts and not any(text.startswith(said) or text.endswith(said) for text in texts):
                raise Wrong(f"{said!r} is scored, which no row of {rows} says")


CHECKS = {f.__name__: f for f in (files, written_rows, tokenized_rows)}
