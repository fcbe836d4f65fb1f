"""Rows of token ids are checked and taken as they are."""

import pytest

from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError

EOS = 2


def rows_of(tokens) -> list[dict]:
    return [{name: value for name, value in row.items() if value is not None} for row in tokens.to_list()]


def test_what_tokenize_makes_is_taken_as_it_is(tokenizer, pairs, labelled):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    chat = [{"messages": [user, answer, user, answer]}]
    for rows in (pairs, labelled, chat):
        made, before = tokenize(rows, tokenizer)
        for given in (made, made.to_list()):
            again, report = tokenize(given, tokenizer)
            assert again.to_list() == made.to_list() and again.features == made.features
            assert (report.scored_tokens, report.tokens_shared) == (before.scored_tokens, before.tokens_shared)
            assert report.format.startswith("tokens of ") and report.eos_missing == 0 and not report.plain_on_chat


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt_ids": [5], "completion_ids": [6, EOS]}, {"prompt_ids": [5], "completion_ids": [[6, EOS]]}),
        (
            {"prompt_ids": [5], "chosen_ids": [6, EOS], "rejected_ids": [7, EOS]},
            {"prompt_ids": [5], "completion_ids": [[6, EOS], [7, EOS]]},
        ),
        (
            {"prompt_input_ids": [5], "chosen_input_ids": [6, EOS], "rejected_input_ids": [7, EOS]},
            {"prompt_ids": [5], "completion_ids": [[6, EOS], [7, EOS]]},
        ),
        (
            {"input_ids": [5, 6, 7, EOS, 8], "labels": [-100, 6, -100, EOS, -100]},
            {"prompt_ids": [5], "completion_ids": [[6, 7, EOS]], "completion_mask": [[1, 0, 1]]},
        ),
        (
            {"input_ids": [0, 5, 6, EOS, 0], "attention_mask": [0, 1, 1, 1, 0], "labels": [-100, -100, 6, EOS, -100]},
            {"prompt_ids": [5], "completion_ids": [[6, EOS]]},
        ),
        (
            {"input_ids": [5, 6, EOS], "assistant_masks": [0, 1, 1]},
            {"prompt_ids": [5], "completion_ids": [[6, EOS]]},
        ),
        ({"input_ids": [5, 6, EOS]}, {"prompt_ids": [], "completion_ids": [[5, 6, EOS]]}),
    ],
)
def test_token_ids_in_every_form(tokenizer, row, wanted):
    tokens, _ = tokenize([row], tokenizer)
    assert rows_of(tokens) == [wanted]


def test_completions_without_eos_are_counted(tokenizer):
    tokens, report = tokenize([{"prompt_ids": [5], "completion_ids": [6, 7]}], tokenizer)
    assert tokens[0]["completion_ids"] == [[6, 7]] and report.eos_missing == 1
    assert "1 lack it" in str(report) and "does not learn from them to stop" in str(report)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt_ids": [5], "completion_ids": [6, 259]}, "token ids must be integers from 0 to 258, found [6, 259]"),
        ({"prompt_ids": [-1], "completion_ids": [6]}, "found [-1]"),
        ({"prompt_ids": [5], "completion_ids": []}, "no token of a completion is scored"),
        ({"prompt_ids": [], "completion_ids": [6]}, "no token of a completion is scored"),
        (
            {"prompt_ids": [5], "completion_ids": [6, 7], "completion_mask": [1]},
            "a mask must hold 0 or 1 for each of 2",
        ),
        ({"prompt_ids": [5], "completion_ids": [6, 7], "completion_mask": [2, 1]}, "a mask must hold 0 or 1"),
        ({"prompt_ids": [5], "chosen_ids": [5, 6], "rejected_ids": [5, 7]}, "both completions begin with the prompt"),
        ({"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [6]}, "chosen and rejected are the same tokens"),
        ({"input_ids": [5, 6], "labels": [6, 7]}, "labels are not shifted"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no token is scored"),
        ({"input_ids": [5, 6], "labels": [6]}, "labels or masks as long as it is"),
        ({"prompt_ids": ["a"], "completion_ids": [6]}, "token ids must be integers"),
    ],
)
def test_what_is_no_row_of_tokens_is_refused(tokenizer, row, words):
    with pytest.raises(DataError) as error:
        tokenize([row], tokenizer)
    assert words in str(error.value)


def test_lengths_and_kinds_are_checked(tokenizer):
    row = {"prompt_ids": [5, 6, 7, 8], "completion_ids": [6, EOS]}
    with pytest.raises(DataError, match=r"longer than max_length=4 tokens"):
        tokenize([row], tokenizer, max_length=4)
    tokens, _ = tokenize([row], tokenizer, max_length=4, on_truncate="keep_end")
    assert tokens[0]["prompt_ids"] == [7, 8]
    with pytest.raises(DataError, match=r"'tokens of completions \(prompt_ids, completion_ids\)'; pairs, with chosen"):
        tokenize([row], tokenizer, wanted="pairs")
    pair = {"prompt_ids": [5], "chosen_ids": [6, EOS], "rejected_ids": [7, EOS]}
    assert tokenize([pair], tokenizer, wanted="labelled")[0]["label"][:] == [True, False]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[[2], [3]], [[2]]], 2),
        ([[[2]], [[2], [3]]], 1),
    ],
)
def test_a_row_with_more_or_fewer_completions_than_the_first_is_refused(tokenizer, rows, wanted):
    """Objectives take completions in pairs: one that is missing would shift all pairs after it."""
    given = [{"prompt_ids": [1], "completion_ids": completions} for completions in rows]
    with pytest.raises(DataError, match=rf"row 2: has {3 - wanted} completions, where {wanted} are expected"):
        tokenize(given, tokenizer)
    labelled = [{"prompt_ids": [1], "completion_ids": [[2], [3]], "label": True}]
    with pytest.raises(DataError, match="has 2 completions, where 1 are expected"):
        tokenize(labelled, tokenizer)
