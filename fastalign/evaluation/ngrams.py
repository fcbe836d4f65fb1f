"""Texts as words and hashes of n-grams, where case, line breaks, punctuation and Unicode variants do not matter."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

EAST_ASIAN = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # written without spaces: each character is a word
_WORD = re.compile(rf"[{EAST_ASIAN}]|[^\W_{EAST_ASIAN}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing; from the golden ratio


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation. Each Chinese or Japanese character is a word."""
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold())


def ngram_hashes(texts: Sequence[Sequence[str]], n: int) -> tuple[np.ndarray, np.ndarray]:
    """A hash of every n-gram of some texts. Hashes are equal within a process only.

    Args:
        texts: The words of each text.
        n: The length of the n-grams.

    Returns:
        (G,) uint64 hashes of all n-grams, text by text, and (G,) int64, the number of the text of each.
    """
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    words = np.fromiter(map(hash, chain.from_iterable(texts)), np.int64, int(lengths.sum())).view(np.uint64)
    owner = np.repeat(np.arange(len(texts)), lengths)
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(n):
        hashes = hashes * _FACTOR + words[place : place + count]  # modulo 2^64
    inside = owner[:count] == owner[n - 1 : n - 1 + count]  # n-grams that reach into the next text are none
    return hashes[inside], owner[:count][inside]


def row_text(row: Mapping[str, Any]) -> str:
    """All text of a row, also that inside messages and lists."""
    return "\n".join(_strings(row.values()))


def _strings(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _strings(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _strings(value)
