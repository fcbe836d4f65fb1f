"""Which items of a suite a text rephrases: near neighbours by rare words, pairs of words, and numbers.

A rephrasing changes most words, so no long n-gram survives. The names, the things and the numbers of a problem stay.
The similarity of an item and a window of a text is

    cosine(words and pairs of words, weighted by rarity) (1/4 + share of the item's numbers that are there) / (5/4)

How similar unrelated problems are depends on the suite, so the threshold comes from the suite itself: at most 1 % of
its items are that similar to an item of its other half. A training set with far more problems of the same kind than
the suite has will show more than 1 % by mistake.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastalign.evaluation.ngrams import EAST_ASIAN

FALSE_RATE = 0.01
LEAST_WORDS = 8  # of an item or window: fewer say too little to be recognised
_COLUMNS = 2**20
_WORDS_ALONE = 0.25  # what words without the numbers count
_FLOOR = {True: 0.1, False: 0.3}  # the least threshold, of items with and without numbers
_FEW = 50  # items, below which their own similarities say nothing about the threshold
_STRICT = 0.6  # the threshold then
_BLOCK = 1000  # windows that are compared at once
_TERM = re.compile(rf"\d+(?:[.,]\d+)*|[{EAST_ASIAN}]|[^\W\d_{EAST_ASIAN}]+")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_VALUES = {word: str(value) for value, word in enumerate(_NUMBERS)}


class Neighbour(NamedTuple):
    """The text that is nearest to an item.

    Attributes:
        item: The number of the item.
        text: The number of the text.
        similarity: 0 to 1.
    """

    item: int
    text: int
    similarity: float


def terms_of(text: str) -> list[str]:
    """The words and numbers of a text: words in small letters, numbers as digits, without commas between thousands."""
    found = _TERM.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold())
    return [_VALUES.get(term) or (term.replace(",", "") if term[0].isdigit() else term) for term in found]


def near_neighbours(items: Sequence[str], texts: Sequence[str]) -> list[Neighbour]:
    """The items that a text rephrases, each with the nearest text.

    Args:
        items: The texts of a suite's items.
        texts: The training texts.

    References:
        Yang et al. 2023, arXiv:2311.04850, on rephrased test items that n-grams do not find.
    """
    index = _Index([terms_of(item) for item in items])
    best, where = np.zeros(len(items), np.float32), np.zeros(len(items), np.int64)
    for owners, similarity in index.compare(texts):
        nearest = similarity.argmax(1)
        value = similarity[np.arange(len(items)), nearest]
        where = np.where(value > best, owners[nearest], where)
        best = np.maximum(best, value)
    threshold = index.thresholds()
    return [Neighbour(int(i), int(where[i]), float(best[i])) for i in np.flatnonzero(best >= threshold)]


class _Index:
    """The features of a suite's items, and the weights that its words have."""

    def __init__(self, items: Sequence[Sequence[str]]):
        self.items = items
        lengths = [len(words) for words in items] or [1]
        # Longer than nearly every item, so that a window holds all of an item's numbers, with its answer.
        self.window = max(64, int(1.3 * np.quantile(lengths, 0.99)))
        words, numbers = _matrix(items, _features), _matrix(items, _numbers)
        self.weights, self.number_weights = _rarity(words), _rarity(numbers)
        self.words, self.numbers = _unit(words, self.weights), numbers.multiply(self.number_weights).tocsr()
        self.usable = np.array([len(words) >= LEAST_WORDS for words in items])
        self.has_numbers = np.asarray(numbers.sum(1)).ravel() > 0

    def compare(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of windows: (W,) the text of each, and (items, W) float32 similarities."""
        windows, owners = [], []
        for number, text in enumerate(texts):
            words = terms_of(text)
            for start in range(0, max(1, len(words) - self.window // 2), self.window // 2):
                window = words[start : start + self.window]
                if len(window) >= LEAST_WORDS:
                    windows.append(window)
                    owners.append(number)
        for start in range(0, len(windows), _BLOCK):
            block = windows[start : start + _BLOCK]
            yield np.array(owners[start : start + _BLOCK]), self._similarity(block)

    def _similarity(self, windows: Sequence[Sequence[str]]) -> np.ndarray:
        """(items, windows) float32."""
        words = _unit(_matrix(windows, _features), self.weights)
        cosine = (self.words @ words.T).toarray()
        numbers = _matrix(windows, _numbers)
        shared = (self.numbers @ numbers.T).toarray()
        total = np.asarray(self.numbers.sum(1)).ravel()[:, None]
        share = np.where(total > 0, shared / np.maximum(total, 1e-9), 1.0)  # of the item's numbers
        similarity = cosine * (_WORDS_ALONE + share) / (_WORDS_ALONE + 1)
        return np.where(self.usable[:, None], similarity, 0).astype(np.float32)

    def thresholds(self) -> np.ndarray:
        """(items,) float64: the similarity from which on an item is taken for rephrased.

        Every second item is compared with the others, which are other problems of the same kind.
        """
        count = len(self.items)
        nearest = np.zeros(count)
        for start in range(0, count, _BLOCK):
            part = self._similarity(self.items[start : start + _BLOCK])
            is_other = np.arange(count)[:, None] % 2 != (start + np.arange(part.shape[1]))[None] % 2
            nearest = np.maximum(nearest, np.where(is_other, part, 0).max(1))
        found = np.full(count, _STRICT)
        for kind in (True, False):
            group = self.usable & (self.has_numbers == kind)
            if group.sum() >= _FEW:
                found[group] = max(_FLOOR[kind], float(np.quantile(nearest[group], 1 - FALSE_RATE)))
        return found


def _features(words: Sequence[str]) -> Counter:
    """Beginnings of words, since a rephrasing changes their endings, and pairs of neighbours."""
    stems = [word[:5] for word in words]
    return Counter([*stems, *pairwise(stems)])


def _numbers(words: Sequence[str]) -> Counter:
    """Numbers; the second occurrence of one is a feature of its own."""
    seen: Counter = Counter()
    features: Counter = Counter()
    for value in words:
        if value[0].isdigit():
            seen[value] += 1
            features[(value, seen[value])] = 1
    return features


def _matrix(texts: Sequence[Sequence[str]], features: Any) -> Any:
    """(texts, _COLUMNS) sparse float32: 1 + log(count) of each feature, whose column is its hash."""
    from scipy.sparse import csr_matrix

    values, columns, ends = [], [], [0]
    for words in texts:
        counts = features(words)
        columns.extend(hash(feature) % _COLUMNS for feature in counts)
        values.extend(counts.values())
        ends.append(len(columns))
    data = 1 + np.log(np.array(values, np.float32))
    return csr_matrix((data, np.array(columns, np.int64), np.array(ends, np.int64)), shape=(len(texts), _COLUMNS))


def _rarity(matrix: Any) -> np.ndarray:
    """(_COLUMNS,) float32: log of the inverse share of items that have a feature, at least 0."""
    counts = np.bincount(matrix.indices, minlength=_COLUMNS)
    return np.log((matrix.shape[0] + 1) / (counts + 0.5)).clip(0).astype(np.float32)


def _unit(matrix: Any, weights: np.ndarray) -> Any:
    """The weighted rows at length 1."""
    from scipy.sparse import diags

    weighted = matrix.multiply(weights).tocsr()
    length = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).ravel())
    return (diags(1 / np.maximum(length, 1e-9)) @ weighted).tocsr().astype(np.float32)
