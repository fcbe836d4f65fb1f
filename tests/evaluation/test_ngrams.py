"""Words and n-grams, against a plain computation."""

from __future__ import annotations

from itertools import pairwise

from fastalign.evaluation.ngrams import ngram_hashes, row_text, words_of


def test_words():
    assert words_of("Don't  STOP,\nnow_or 3.5!") == ["don", "t", "stop", "now", "or", "3", "5"]
    assert words_of("我爱AI\uff0cok") == ["我", "爱", "ai", "ok"]
    assert words_of("\uff21\uff22 \ufb01n") == ["ab", "fin"]


def test_n_grams_do_not_reach_into_the_next_text():
    texts = [["a", "b", "c"], ["a"], [], ["b", "c", "a", "b"]]
    hashes, owner = ngram_hashes(texts, 2)
    plain = [(pair, number) for number, text in enumerate(texts) for pair in pairwise(text)]
    assert owner.tolist() == [number for _, number in plain]
    names = {pair: value for (pair, _), value in zip(plain, hashes.tolist(), strict=True)}
    assert [names[pair] for pair, _ in plain] == hashes.tolist()
    assert len(set(names.values())) == len(names) == 3
    assert len(ngram_hashes([["a"]], 2)[0]) == 0


def test_the_text_of_a_row():
    row = {"messages": [{"role": "user", "content": "x"}], "label": True, "n": None, "answer": "y"}
    assert row_text(row) == "user\nx\ny"
