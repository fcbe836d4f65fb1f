"""Diversity on texts whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastalign.errors import InputError
from fastalign.stats import distinct_n, self_bleu, template_share, vendi_score

CAT = ["the", "cat", "sat", "on", "the", "mat"]
DOG = ["a", "dog", "ran", "through", "our", "garden"]


def test_distinct_n():
    assert distinct_n([CAT, CAT]) == 0.5
    assert distinct_n([CAT, DOG]) == 1.0
    assert distinct_n([[1, 1, 1]], 1) == pytest.approx(1 / 3)


def test_self_bleu():
    assert self_bleu([CAT, CAT, CAT]) == pytest.approx(1.0)
    smoothed = math.exp(sum(math.log(1 / (2 * k)) for k in (6, 5, 4, 3)) / 4)
    assert self_bleu([CAT, DOG]) == pytest.approx(smoothed)
    assert smoothed < self_bleu([CAT, DOG, [*CAT[:5], "rug"]]) < 1


def test_a_shorter_text_pays_for_its_brevity():
    short = CAT[:4]
    assert self_bleu([short, CAT]) < 1
    # All n-grams of the short text are in the long one, so only brevity counts: exp(1 - 6 / 4).
    matches = [5 / 6, 3 / 5, 2 / 4, 1 / 3]  # "the" twice in the long text, once in the short one
    assert self_bleu([short, CAT]) == pytest.approx((math.exp(1 - 6 / 4) + math.prod(matches) ** 0.25) / 2, rel=0.05)


def test_vendi_counts_what_is_different():
    assert vendi_score(np.eye(5)) == pytest.approx(5)
    assert vendi_score(np.ones((5, 3))) == pytest.approx(1)
    assert vendi_score([[1, 0], [2, 0], [0, 1], [0, 3]]) == pytest.approx(2), "length does not matter"


def test_template_share():
    assert template_share([CAT, CAT, DOG, DOG, DOG]) == 0.6
    assert template_share([["Sure"], ["Sure"]], opening=3) == 1.0


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: distinct_n([["a"]], 2), "No text has 2 tokens"),
        (lambda: distinct_n([CAT], 0), "n is 0"),
        (lambda: self_bleu([CAT]), "texts has 1 entry; at least 2"),
        (lambda: self_bleu([CAT, CAT[:3]]), "A text has 3 tokens; n is 4"),
        (lambda: vendi_score([[0, 0], [1, 0]]), "1 vectors are 0"),
        (lambda: template_share([]), "texts has 0 entries"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
