"""How different a model's answers are from each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from fastalign.errors import InputError
from fastalign.stats.checks import numbers

Tokens = Sequence[Hashable]


def distinct_n(texts: Sequence[Tokens], n: int = 2) -> float:
    """The share of n-grams that are different: `distinct n-grams / n-grams` over all texts together.

    It falls as texts grow longer, so compare at equal length: cut all texts to one length first.

    Args:
        texts: The words or token ids of each text.
        n: Length of the n-grams.

    Raises:
        InputError: n is below 1, or no text has n tokens.

    References:
        Li et al. 2016, arXiv:1510.03055.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    if not grams:
        raise InputError(f"No text has {n} tokens: pass longer texts, or a smaller n")
    return len(set(grams)) / len(grams)


def self_bleu(texts: Sequence[Tokens], n: int = 4) -> float:
    """How well each text is described by the others: the mean BLEU of one against all others; 1 if all are equal.

    Counts of n-grams without a match are smoothed by `1 / (2 * count)`. It takes time in the square of the texts.

    Args:
        texts: At least two lists of words or token ids.
        n: The longest n-grams.

    Raises:
        InputError: There are fewer than two texts, or one is shorter than n tokens.

    References:
        Zhu et al. 2018, arXiv:1802.01886; Papineni et al. 2002 (BLEU).
    """
    if len(texts) < 2:
        raise InputError(f"texts has {len(texts)} entr{'y' if len(texts) == 1 else 'ies'}; at least 2 are compared")
    if shortest := [len(text) for text in texts if len(text) < n]:
        raise InputError(f"A text has {shortest[0]} tokens; n is {n}: leave it out, or pass a smaller n")
    counts = [[Counter(_ngrams(text, k)) for k in range(1, n + 1)] for text in texts]
    scores = []
    for i, text in enumerate(texts):
        others = [j for j in range(len(texts)) if j != i]
        logs = 0.0
        for k in range(n):
            matches = sum(min(c, max(counts[j][k][gram] for j in others)) for gram, c in counts[i][k].items())
            total = sum(counts[i][k].values())
            logs += math.log(matches / total if matches else 1 / (2 * total)) / n
        nearest = min((abs(len(texts[j]) - len(text)), len(texts[j])) for j in others)[1]
        scores.append(math.exp(logs + min(0.0, 1 - nearest / len(text))))
    return sum(scores) / len(scores)


def vendi_score(features: ArrayLike) -> float:
    """The effective number of different texts: `exp(-sum(l log l))` of the eigenvalues l of the similarities over n.

    n texts that have nothing in common give n, n equal ones give 1.

    Args:
        features: (n, d) a vector per text, such as its mean hidden state. Similarity is the cosine.

    Raises:
        InputError: A vector is 0 or not finite, or there is none.

    References:
        Friedman and Dieng 2023, arXiv:2210.02410.
    """
    rows = numbers("features", features, ndim=2)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise InputError(f"{np.sum(norms == 0)} vectors are 0 and have no direction: leave them out")
    rows = rows / norms / math.sqrt(len(rows))
    values = np.linalg.svd(rows, compute_uv=False) ** 2  # the eigenvalues of rows rows', which sum to 1
    values = values[values > 0]
    return float(np.exp(-np.sum(values * np.log(values))))


def template_share(texts: Sequence[Tokens], opening: int = 3) -> float:
    """The share of texts that begin with the commonest opening: 1 where every answer starts alike.

    Args:
        texts: The words or token ids of each text. Shorter texts are their own opening.
        opening: How many tokens an opening has.

    Raises:
        InputError: There is no text, or the opening is below 1.
    """
    if not texts or opening < 1:
        raise InputError(f"texts has {len(texts)} entries and opening is {opening}; at least 1 of each is needed")
    counts = Counter(tuple(text[:opening]) for text in texts)
    return counts.most_common(1)[0][1] / len(texts)


def _ngrams(text: Tokens, n: int) -> list[tuple]:
    if n < 1:
        raise InputError(f"n is {n}; expected at least 1")
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
