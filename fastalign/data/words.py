"""Tokens of many texts in less time: what lies between two spaces is tokenised once, and remembered.

The tokenizers of GPT-2, Llama 3, Qwen and their relatives cut a text into words before they look for tokens in it, and
every space behind another character begins a new word. So the tokens of a text are those of its pieces:

    tokens("a b, c") = tokens("a") + tokens(" b,") + tokens(" c")

A natural text repeats its words, so most pieces are found in a dictionary, which takes a quarter of the time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

_CUT = re.compile(r"(?<=\S)(?= )")  # before each space that follows another character
_MARK = "\0"
_UNUSUAL = re.compile(rf"\s |{_MARK}")  # a space that is no cut, or the mark itself
MAX_PIECES = 100_000  # how many are remembered, about 25 MB
MAX_CHARACTERS = 40  # of a piece that is remembered; code and Chinese text have longer ones, which rarely come again

# How a text is cut into words. In none of these patterns can one match hold a space behind a character that is not
# white space, and none looks back at what is before its match. So a match ends before such a space, and the next one
# begins there, whatever the rest of the text is.
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
PATTERNS = (_GPT2, _LLAMA3, _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"))  # the last one is Qwen's


class Words:
    """Token ids of texts, by way of their pieces. Use `Words.of`, which knows for which tokenizers that is exact.

    Args:
        tokenize: returns the token ids of each of some texts.
    """

    def __init__(self, tokenize: Callable[[list[str]], list[list[int]]]):
        self._tokenize = tokenize
        self._known: dict[str, list[int]] = {}

    @classmethod
    def of(cls, tokenizer: Any, tokenize: Callable[[list[str]], list[list[int]]]) -> Words | None:
        """The words of a tokenizer; None if its tokens may depend on what is before or behind a space."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not type(tokenizer).__module__.startswith("transformers."):
            return None
        return cls(tokenize) if _begins_words_at_spaces(json.loads(backend.to_str())) else None

    def pieces(self, text: str) -> list[str]:
        """The text, cut before each space that follows another character."""
        if _UNUSUAL.search(text):
            return _CUT.split(text)
        pieces = text.replace(" ", f"{_MARK} ").split(_MARK)  # the same, in a third of the time
        return pieces[1:] if text[:1] == " " else pieces

    def ids(self, texts: list[list[str]]) -> list[list[int]]:
        """The token ids of texts that are given by their pieces."""
        if len(self._known) > MAX_PIECES:
            self._known.clear()
        known = self._known
        new = list(set(chain.from_iterable(texts)) - known.keys())
        found = dict(zip(new, self._tokenize(new), strict=True))
        known.update(found)
        ids = [list(chain.from_iterable(map(known.__getitem__, pieces))) for pieces in texts]
        for piece in new:
            if len(piece) > MAX_CHARACTERS:
                del known[piece]
        return ids


def _begins_words_at_spaces(backend: dict) -> bool:
    """Whether every space behind another character begins a new word, given a tokenizer as its JSON file holds it."""
    model, normalizer, tokens = backend["model"], backend["normalizer"], backend["added_tokens"]
    return (
        model["type"] == "BPE"
        and not model.get("dropout")  # draws at random
        and (normalizer is None or normalizer["type"] == "NFC")  # which joins no character with a space
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens)
        and not any(re.search(r"\s", token["content"]) for token in tokens)
        and _cuts_at_spaces(backend["pre_tokenizer"])
    )


def _cuts_at_spaces(step: dict | None) -> bool:
    """Whether a pre-tokenizer is made of steps that are known, one of which cuts a text into words."""
    steps = [] if step is None else step["pretokenizers"] if step["type"] == "Sequence" else [step]
    cuts = [
        (step["type"] == "ByteLevel" and step["use_regex"])
        or (step["type"] == "Split" and step["pattern"].get("Regex") in PATTERNS and not step["invert"])
        for step in steps
    ]
    known = all(
        cut or step["type"] in ("Digits", "ByteLevel") for cut, step in zip(cuts, steps, strict=True)
    ) and not any(step.get("add_prefix_space") for step in steps)
    isolated = all(step.get("behavior", "Isolated") == "Isolated" for step in steps)
    return known and isolated and any(cuts)
