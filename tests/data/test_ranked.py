"""Answers with ratings, ranks or a winner become the pair of the best one and the worst one."""

import pytest

from fastalign.data import ranked
from fastalign.data.messages import RowProblem

PAIR = [{"chosen": "good", "rejected": "bad"}]


@pytest.mark.parametrize(
    ("values", "sign"),
    [([1, 3, 2], 1), (["1", "3.5", "2"], 1), ([3, 1, 2], -1), ([0.5, 0.9, None], 1), ([1, 9, 9], 1), ([1, 9, 1], 1)],
)
def test_the_best_and_the_worst_answer_are_a_pair(values, sign):
    assert ranked.with_values(["bad", "good", "so"], values, sign) == PAIR


@pytest.mark.parametrize("values", [[1, 1], [None, 2], []])
def test_answers_of_one_value_give_no_pair(values):
    assert ranked.with_values(["a", "b"][: len(values)], values) == []


@pytest.mark.parametrize(
    "answers",
    [
        [{"response": "bad", "overall_score": 2.0}, {"response": "good", "overall_score": 7.5}],
        # The mean of several aspects counts more than the overall score.
        [
            {"response": "bad", "overall_score": 85.0, "fine-grained_score": 2},
            {"response": "good", "overall_score": 7.0, "fine-grained_score": 4},
        ],
        [{"answer": "bad", "rank": 7.0}, {"answer": "good", "rank": 1.0}],
        [{"text": "bad", "pm_score": 0}, {"text": "good", "pm_score": 3}, {"text": "not rated", "pm_score": None}],
    ],
)
def test_answers_with_their_own_rating(answers):
    assert all(map(ranked.has_value, answers[:2]))
    assert ranked.rated(answers) == PAIR


def test_a_list_in_order_starts_with_the_best_answer():
    assert ranked.in_order(["good", {"text": "so"}, "bad"]) == PAIR


@pytest.mark.parametrize("winner", ["A", "model_a", " Model_A "])
def test_the_winner_of_two_is_chosen(winner):
    names = (("a", "model_a"), ("b", "model_b"))
    assert ranked.of_two("good", "bad", winner, names) == PAIR
    assert ranked.of_two("bad", "good", "b", names) == PAIR
    assert ranked.of_two("bad", "good", "tie (bothbad)", names) == []
    with pytest.raises(RowProblem, match="must be one of"):
        ranked.of_two("bad", "good", "model_c", names)


def test_a_number_names_the_winner_too():
    assert ranked.of_two("bad", "good", 1.0, (("0",), ("1",))) == PAIR


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ranked.with_values(["a"], [1, 2]), "as many ratings as answers"),
        (lambda: ranked.with_values("ab", [1, 2]), "as many ratings as answers"),
        (lambda: ranked.with_values(["a", "b"], [1, "x"]), "a rating must be a number, found 'x'"),
        (lambda: ranked.with_values(["a", "b"], [1, float("nan")]), "a rating must be a number, found nan"),
        (lambda: ranked.rated("a"), "must be a list"),
        (lambda: ranked.in_order("a"), "must be a list"),
        (lambda: ranked.rated([{"score": 1, "who": "x"}]), "an answer must be text"),
    ],
)
def test_what_is_no_rating_is_refused(call, words):
    with pytest.raises(RowProblem, match=words):
        call()
