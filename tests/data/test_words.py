"""Pieces between spaces: the same tokens as of the text as a whole, for the tokenizers where that must be so."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from fastalign.data import words as module
from fastalign.data.chat import Example
from fastalign.data.encoding import encode_examples, words_of
from fastalign.data.words import PATTERNS, Words

# What the patterns treat differently: letters, digits, marks, white space of several kinds, contractions, specials.
PARTS = [
    *("a", "the", "IT'S", "'ll", "1", "23", "\u0301", "é", "漢", "_", "...", "🙂", "<|im_end|>"),
    *(" ", "  ", "\n", "\t ", "\r\n", "\u00a0", "\u2003", "\x1c", "\u180e", "\u0085"),
]
texts = st.lists(st.sampled_from(PARTS), max_size=14).map("".join) | st.text(max_size=30)


def with_split(tokenizer, pattern, normalizer=None):
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    if normalizer:
        backend.normalizer = normalizer
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(byte_level):
    """Tokenizers that have learnt tokens of several spaces, digits and marks, where a wrong cut would show."""
    splits = [with_split(byte_level(), pattern, normalizers.NFC()) for pattern in PATTERNS]
    sentences = ["the 1234   \n\n  it's....\t\t a  \u00a0\u00a0 b\u2003\u2003 é漢漢 \r\n\r\n!!! IT'LL   "] * 50
    return [one.train_new_from_iterator(sentences, 500, show_progress=False) for one in (byte_level(), *splits)]


@pytest.mark.parametrize("number", range(4))
@settings(max_examples=150, deadline=None)
@given(prompt=texts, completion=texts)
def test_the_tokens_are_those_of_the_texts_as_a_whole(tokenizers, number, prompt, completion):
    tokenizer = tokenizers[number]
    words = words_of(tokenizer)
    assert words is not None
    (ids,) = words.ids([words.pieces(prompt)])
    assert ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    examples = [Example(prompt, [completion, prompt], [None, [(0, len(prompt))]])]
    assert encode_examples(examples, tokenizer, words) == encode_examples(examples, tokenizer)


def test_pieces_are_tokenised_once_and_forgotten_when_there_are_too_many(monkeypatch):
    asked = []

    def tokenize(pieces):
        asked.append(sorted(pieces))
        return [[len(piece)] for piece in pieces]

    words = Words(tokenize)
    assert words.pieces("a bc  d\n e") == ["a", " bc", "  d\n e"]
    assert words.ids([["a", " bc", "a"], [" bc"]]) == [[1, 3, 1], [3]]
    long = "x" * (module.MAX_CHARACTERS + 1)
    assert words.ids([["a", long], [long]]) == [[1, len(long)], [len(long)]]
    words.ids([["a", long]])
    assert asked == [[" bc", "a"], [long], [long]]  # a long piece is not remembered
    monkeypatch.setattr(module, "MAX_PIECES", 1)
    words.ids([["a"]])
    assert asked[-1] == ["a"]


def test_tokenizers_whose_tokens_may_depend_on_more_take_texts_as_a_whole(byte_level, metaspace):
    assert words_of(metaspace()) is None
    for token in (AddedToken("word", rstrip=True), AddedToken("a b"), AddedToken("word", single_word=True)):
        tokenizer = byte_level()
        tokenizer.add_tokens([token])
        assert words_of(tokenizer) is None, token
    for change in (
        lambda backend: backend["model"].update(dropout=0.1),
        lambda backend: backend["pre_tokenizer"].update(add_prefix_space=True),
        lambda backend: backend["pre_tokenizer"].update(use_regex=False),
        lambda backend: backend.update(pre_tokenizer=None),
        lambda backend: backend.update(normalizer={"type": "Lowercase"}),
    ):
        backend = json.loads(byte_level().backend_tokenizer.to_str())
        change(backend)
        changed = type(byte_level().backend_tokenizer).from_str(json.dumps(backend))
        assert words_of(PreTrainedTokenizerFast(tokenizer_object=changed, eos_token="<s>")) is None, change
    assert words_of(with_split(byte_level(), r"\s+|\S+")) is None

    class Own(PreTrainedTokenizerFast):
        """A class that may tokenise in its own way."""

    assert words_of(Own(tokenizer_object=byte_level().backend_tokenizer, eos_token="<s>")) is None
