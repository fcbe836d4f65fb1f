import json
import re

import numpy as np
import pytest

from fastalign.data.report import DataReport, Lengths


def report(**changes) -> DataReport:
    values = {
        "format": "preference, plain strings",
        "rows_in": 1200,
        "rows_kept": 1197,
        "dropped": {"too long": 1, "empty completion": 2},
        "dropped_rows": {"too long": [7], "empty completion": [3, 1100]},
        "prompt_length": Lengths(3, 10.25, 20, 31),
        "completion_length": Lengths(2, 7.5, 12, 15),
        "completions": 2394,
        "tokens_shared": 30000,
        "tokens_unshared": 42000,
        "scored_tokens": 18000,
    }
    return DataReport(**{**values, **changes})


def test_lengths_are_exact_on_a_known_sample():
    lengths = Lengths.of(np.arange(1, 101))
    assert lengths == Lengths(min=1, mean=50.5, p95=96, max=100)


def test_the_percentile_is_a_length_that_occurs():
    assert Lengths.of(np.array([1, 1, 1000])).p95 == 1000
    assert Lengths.of(np.array([4])) == Lengths(4, 4.0, 4, 4)


def test_the_table_names_what_was_found():
    text = str(report())
    for line in (
        "Preflight: preference, plain strings",
        r"rows +1,197 of 1,200 kept",
        r"dropped: too long +1 \(row 7\)",
        r"dropped: empty completion +2 \(rows 3, 1100\)",
        r"prompt tokens +min 3   mean 10.2   95 % 20   max 31",
        r"tokens +30,000 with each prompt once, 42,000 with a prompt per completion",
        r"scored tokens +18,000 \(60.0% of the tokens\)",
        r"duplicate BOS +none",
        r"token merges +none",
    ):
        assert re.search(line, text), line
    assert "!" not in text


def test_values_stand_in_one_column_and_extra_pairs_join_the_table():
    text = report().render([("trainable parameters", "460,800 of 134,515,008"), ("predicted memory", "1.2 GB")])
    table = text.splitlines()[1:]
    assert table[-2].endswith("460,800 of 134,515,008")
    column = table[-1].index("1.2 GB")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in table)


@pytest.mark.parametrize(
    ("counter", "words"),
    [
        ("token_merges", "merge with the end of their prompt"),
        ("eos_inside", "hold an EOS before their end"),
        ("prompts_cut", "lost the beginning of their prompt"),
        ("template_mismatch", "chat template's generation prompt"),
    ],
)
def test_each_counter_that_needs_a_look_is_explained(counter, words):
    notes = [line for line in str(report(**{counter: 5})).splitlines() if "!" in line]
    assert len(notes) == 1
    assert notes[0].strip().startswith("! 5 of ")
    assert words in notes[0]


def test_a_long_list_of_dropped_rows_says_that_it_goes_on():
    text = str(report(dropped={"too long": 9}, dropped_rows={"too long": [1, 2, 3, 4, 5]}))
    assert "9 (rows 1, 2, 3, 4, 5, ...)" in text


def test_the_limit_is_shown_where_there_is_one():
    assert "(max_length 2,048)" in str(report(max_length=2048))
    assert "max_length" not in str(report())


def test_to_dict_is_plain_json_and_complete():
    values = json.loads(json.dumps(report().to_dict()))
    assert values["scored_fraction"] == 0.6
    assert values["prompt_length"] == {"min": 3, "mean": 10.25, "p95": 20, "max": 31}
    assert values["dropped"] == {"too long": 1, "empty completion": 2}
    assert values["rows_in"] - sum(values["dropped"].values()) == values["rows_kept"]
