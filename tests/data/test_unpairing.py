"""Pairs as twice as many labelled rows."""

from fastalign.data import tokenize


def test_each_pair_becomes_two_labelled_rows(pairs, tokenizer):
    tokens, _ = tokenize(pairs, tokenizer)
    made, report = tokenize(pairs, tokenizer, wanted="labelled")
    wanted = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": [completion], "label": not n}
        for row in tokens
        for n, completion in enumerate(row["completion_ids"])
    ]
    assert made.to_list() == wanted and report.unpaired
    # As if they had been given as labelled rows, with the same types.
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    labelled, _ = tokenize(rows, tokenizer)
    assert made.to_list() == labelled.to_list() and made.features == labelled.features


def test_masks_are_taken_along(tokenizer):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    pair = {"prompt": [user], "chosen": [answer, user, answer], "rejected": [{"role": "assistant", "content": "no"}]}
    tokens, _ = tokenize([pair] * 2, tokenizer)
    made, _ = tokenize([pair] * 2, tokenizer, wanted="labelled")
    assert [row["completion_mask"][0] for row in made] == tokens[0]["completion_mask"] * 2
