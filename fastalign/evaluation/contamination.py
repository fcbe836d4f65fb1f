"""Are a suite's items in the training data? Then the suite says how well the model remembers, not what it can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastalign.errors import DataError
from fastalign.evaluation.neighbours import FALSE_RATE, LEAST_WORDS, near_neighbours
from fastalign.evaluation.ngrams import ngram_hashes, words_of
from fastalign.evaluation.suite import Item, Suite

WORDS = 13  # of an n-gram: what GPT-3 and most after it look for
ALLOWED = 0.01  # the share of a suite's items that may be hit
_OVERLAP = 0.1  # the share of an item's n-grams that must be in the data
_CHUNK = 2000  # texts whose n-grams are looked up at once


def check_contamination(texts: Sequence[str], suites: Sequence[Suite], *, rephrased: bool = True) -> dict[str, Any]:
    r"""The items of suites that are in training texts, word by word or rephrased.

    - Verbatim: a tenth of an item's n-grams of 13 words are in the texts. Case, line breaks, punctuation and Unicode
      variants do not matter, and each Chinese or Japanese character counts as a word. N-grams that are in more than 1 %
      of the different texts (and in more than 10), or in more than 5 % of the items, are boilerplate and do not count.
    - Rephrased: see `fastalign/evaluation/neighbours.py`. About 1 % of a suite's items are found by mistake.

    Args:
        texts: The training texts.
        suites: The suites.
        rephrased: Whether rephrased items are looked for too, which takes longer.

    Returns:
        `texts` (their number), `contaminated` (whether any suite is), and `suites`: name -> `items`, `verbatim` and
        `rephrased` (lists of `id`, `text`, the number of a text from 0 on, and `overlap` or `similarity`), `share` (of
        the checkable items, verbatim), `not_checkable` (ids of items that are too short for both), `contaminated`:
        more than 1 % of the items are verbatim, or more are rephrased than chance explains (p below 0.001).

    Raises:
        DataError: There is no text or no suite.

    Examples:
        >>> suite = Suite.from_rows("s", [{"prompt": "a b c d e f g h i j k l m n o p", "answer": "q"}])
        >>> check_contamination(["A, b, c: d e f g h i j k l m\nn o p"], [suite])["contaminated"]
        True

    References:
        Brown et al. 2020, arXiv:2005.14165, appendix C.
    """
    if not texts or not suites:
        raise DataError(f"There are {len(texts)} texts and {len(suites)} suites; give at least one of each.")
    first = {text: number for number, text in reversed([*enumerate(texts)])}  # text -> where it is first
    words = [words_of(text) for text in first]
    found = {suite.name: _check_suite(suite, first, words, rephrased) for suite in suites}
    return {
        "texts": len(texts),
        "contaminated": any(report["contaminated"] for report in found.values()),
        "suites": found,
    }


def item_text(item: Item) -> str:
    """What training data must not hold of an item: its prompt and its options."""
    prompt = item.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(str(turn.get("content") or "") for turn in prompt)
    return "\n".join([prompt, *item.choices])


def _check_suite(suite: Suite, first: dict[str, int], words: list[list[str]], rephrased: bool) -> dict[str, Any]:
    """One suite's report; `first` maps each different text to its number, `words` holds the words of each."""
    numbers = [*first.values()]
    items = [words_of(item_text(item)) for item in suite.items]
    ids = [item.id for item in suite.items]
    verbatim = [
        {"id": ids[item], "text": numbers[text], "overlap": overlap} for item, text, overlap in _verbatim(items, words)
    ]
    hit = {entry["id"] for entry in verbatim}
    near = [
        {"id": ids[found.item], "text": numbers[found.text], "similarity": found.similarity}
        for found in (near_neighbours([item_text(item) for item in suite.items], [*first]) if rephrased else ())
        if ids[found.item] not in hit
    ]
    least = LEAST_WORDS if rephrased else WORDS
    short = [name for name, item in zip(ids, items, strict=True) if len(item) < least]
    checkable = len(items) - len(short)
    share = len(verbatim) / max(1, checkable)
    return {
        "items": len(items), "share": share, "verbatim": verbatim, "rephrased": near, "not_checkable": short,
        "contaminated": share > ALLOWED or _above_chance(len(near), checkable, len(first)),
    }  # fmt: skip


def _above_chance(found: int, items: int, texts: int) -> bool:
    """Whether more items look rephrased than chance explains.

    The threshold was set among half as many items. If all texts are problems of the same kind and more in number, the
    nearest one is that near by mistake more often, at most in proportion.
    """
    from scipy.stats import binom

    rate = min(0.2, FALSE_RATE * max(1.0, 2 * texts / max(1, items)))
    return bool(binom.sf(found - 1, items, rate) < 0.001)


def _verbatim(items: list[list[str]], words: list[list[str]]) -> list[tuple[int, int, float]]:
    """(item, text, share of the item's n-grams) of the items that are in the texts."""
    hashes, owner = ngram_hashes(items, WORDS)
    grams, place = np.unique(hashes, return_inverse=True)
    of_items = np.unique(np.stack([place, owner]), axis=1)  # (2, P): each n-gram with each item that has it
    if not len(grams):
        return []
    in_texts, first = np.zeros(len(grams), np.int64), np.full(len(grams), -1)
    for start in range(0, len(words), _CHUNK):
        found, text = ngram_hashes(words[start : start + _CHUNK], WORDS)
        at = np.minimum(np.searchsorted(grams, found), len(grams) - 1)
        known = grams[at] == found
        pairs = np.unique(np.stack([at[known], text[known] + start]), axis=1)
        in_texts += np.bincount(pairs[0], minlength=len(grams))
        new = first[pairs[0]] < 0
        first[pairs[0][new][::-1]] = pairs[1][new][::-1]  # backwards, so that the first text stays
    common = in_texts > max(10, ALLOWED * len(words))
    common |= np.bincount(of_items[0], minlength=len(grams)) > max(3, 0.05 * len(items))
    gram, item = of_items[:, ~common[of_items[0]]]
    total = np.bincount(item, minlength=len(items))
    shared = np.bincount(item, in_texts[gram] > 0, minlength=len(items))
    overlap = shared / np.maximum(total, 1)
    hits = np.flatnonzero((overlap >= _OVERLAP) & (shared > 0))
    where = {int(i): int(first[g]) for g, i in zip(gram[::-1], item[::-1], strict=True) if first[g] >= 0}
    return [(int(i), where[int(i)], float(overlap[i])) for i in hits]
