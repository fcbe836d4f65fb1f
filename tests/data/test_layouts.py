"""Rows of other layouts become rows of a known format, and the report says which layout was recognised."""

import json

import pytest

from fastalign.data import load_rows, tokenize
from fastalign.data.layouts import LAYOUTS
from fastalign.data.show import understood_rows
from fastalign.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(byte_level):
    return byte_level()


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def texts(tokenizer, tokens) -> list[tuple]:
    """(prompt, completions, label) of each row, without the markers of ChatML."""

    def plain(ids):
        text = tokenizer.decode(ids)
        for marker in ("<|im_start|>", "<|im_end|>", "user\n", "assistant\n"):
            text = text.replace(marker, "")
        return text.replace("\n", "|").strip("|")

    rows = [(row["prompt_ids"], *row["completion_ids"]) for row in tokens]
    labels = [(row["label"],) if "label" in row else () for row in tokens]
    return [(*map(plain, row), *label) for row, label in zip(rows, labels, strict=True)]


TREE = {
    "text": "what?", "role": "prompter", "replies": [
        {"text": "bad", "role": "assistant", "rank": 1, "replies": []},
        {"text": "good", "role": "assistant", "rank": 0, "replies": [{"text": "and?", "role": "prompter", "replies": [
            {"text": "so", "role": "assistant", "replies": []}]}]},
    ],
}  # fmt: skip
EXPORT = [
    {"message_id": "1", "parent_id": None, "text": "what?", "role": "prompter", "rank": None, "lang": "en"},
    {"message_id": "2", "parent_id": "1", "text": "bad", "role": "assistant", "rank": 1, "lang": "en"},
    {"message_id": "3", "parent_id": "1", "text": "good", "role": "assistant", "rank": 0, "lang": "en"},
]
PAIR = [("what?", "good", "bad")]
CASES = [
    ("SHP", {"history": "what?", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1}, PAIR),
    ("SHP", {"history": "what?", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0}, PAIR),
    (
        "OpenAI preference",
        {
            "input": {"messages": [user("what?")]},
            "preferred_output": [assistant("good")],
            "non_preferred_output": [assistant("bad")],
        },
        PAIR,
    ),
    (
        "two conversations",
        {
            "conversation_a": [user("what?"), assistant("bad")],
            "conversation_b": [user("what?"), assistant("good")],
            "winner": "model_b",
        },
        PAIR,
    ),
    ("two answers and a winner", {"prompt": "what?", "response_a": "good", "response_b": "bad", "winner": "A"}, PAIR),
    (
        "two answers and the",
        {"prompt": "what?", "response_0": "bad", "response_1": "good", "better_response_id": 1},
        PAIR,
    ),
    (
        "two outputs",
        {"instruction": "what", "input": "now?", "output_1": "bad", "output_2": "good", "preference": 2},
        [("what||now?", "good", "bad")],
    ),
    (
        "two answers with scores",
        {
            "question": {"full_text": "what?", "id": "1"},
            "answer_0": "bad",
            "answer_1": "good",
            "score_0": -1,
            "score_1": 1,
        },
        PAIR,
    ),
    ("answers with ratings", {"prompt": "what?", "completions": ["bad", "good", "so"], "scores": [1, 5, 3]}, PAIR),
    ("answers with ratings", {"prompt": [user("what?")], "responses": ["bad", "good"], "ratings": [1, 5]}, PAIR),
    ("answers with ranks", {"prompt": "what?", "responses": ["bad", "good"], "rank": [2, 1]}, PAIR),
    (
        "rated answers",
        {
            "instruction": "what?",
            "completions": [{"response": "good", "overall_score": 8.0}, {"response": "bad", "overall_score": 2.0}],
        },
        PAIR,
    ),
    (
        "rated answers",
        {"prompt": "what?", "answers": [{"answer": "good", "rank": 1}, {"answer": "bad", "rank": 7}]},
        PAIR,
    ),
    ("ranked answers", {"prompt": "what?", "ranked_responses": ["good", "so", "bad"]}, PAIR),
    ("tree of messages", {"message_tree_id": "1", "prompt": TREE}, PAIR),
    (
        "conversation with a label",
        {"messages": [user("what?"), assistant("good")], "label": True},
        [("what?", "good", True)],
    ),
    (
        "conversation with a label",
        {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "bad"}], "kto_tag": False},
        [("what?", "bad", False)],
    ),
    (
        "instruction with history",
        {"instruction": "and", "input": "now?", "output": "so", "history": [["what?", "good"]]},
        [("what?", "good|and||now?|so")],
    ),
    (
        "pair with history",
        {"instruction": "and?", "input": "", "chosen": "so", "rejected": "no", "history": [["what?", "good"]]},
        [("what?|good|and?", "so", "no")],
    ),
    (
        "labelled instruction with history",
        {"instruction": "and?", "output": "so", "kto_tag": False, "history": [["what?", "good"]]},
        [("what?|good|and?", "so", False)],
    ),
    ("list of turns", {"data": ["what?", "good", "and?", "so"]}, [("what?", "good|and?|so")]),
]


@pytest.mark.parametrize(("name", "row", "wanted"), CASES)
def test_each_layout_becomes_rows_that_can_be_tokenised(tokenizer, name, row, wanted):
    tokens, report = tokenize([row, row], tokenizer)
    assert texts(tokenizer, tokens) == wanted * 2
    assert report.layout.startswith(name) and report.layout in str(report)
    assert (report.rows_in, report.rows_made, report.rows_kept) == (2, 2, 2)
    assert report.unread_columns == (["message_tree_id"] if "message_tree_id" in row else [])


def test_every_layout_of_the_table_has_a_case():
    cases = {name for name, *_ in CASES} | {"export of messages"}
    assert all(any(layout.name.startswith(case) for case in cases) for layout in LAYOUTS)


# Layouts that differ only in the names of columns, or in how a message is written, need no converter.
RENAMED = [
    ({"instruction": "what?", "input": "", "output": "good"}, [("what?", "good")]),
    ({"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "good"}]}, [("what?", "good")]),
    ({"conversations": [user("what?"), assistant("good")]}, [("what?", "good")]),
    (
        {"conversations": [{"role": "User", "content": "what?"}, {"role": "model", "content": "good"}]},
        [("what?", "good")],
    ),
    (
        {
            "conversations": [{"from": "human", "value": "what?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        PAIR,
    ),
    ({"prompt": "what?", "chosen": assistant("good"), "rejected": assistant("bad")}, PAIR),
    ({"instruction": "what?", "input": "", "chosen": "good", "rejected": "bad"}, PAIR),
    ({"instruction": "what?", "output": "good", "kto_tag": True}, [("what?", "good", True)]),
    ({"Question": "what?", "Answer": "good"}, [("what?", "good")]),
    ({"problem": "what?", "solution": "good"}, [("what?", "good")]),
    ({"prompt": "what?", "response": "good"}, [("what?", "good")]),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "at?"}]}],
      "completion": [assistant("good")]}, [("what?", "good")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "wanted"), RENAMED)
def test_other_names_need_no_layout(tokenizer, row, wanted):
    tokens, report = tokenize([row], tokenizer)
    assert (texts(tokenizer, tokens), report.layout, report.unread_columns) == (wanted, "", [])


def test_a_row_that_has_been_chosen_already_is_not_rated_again(tokenizer):
    row = {"prompt": "what?", "chosen": " good", "rejected": " bad", "completions": ["a", "b"], "scores": [1, 2]}
    tokens, report = tokenize([row], tokenizer)
    assert texts(tokenizer, tokens) == [("what?", " good", " bad")]
    assert report.unread_columns == ["completions", "scores"]


def test_a_call_of_a_tool_may_be_a_turn_of_its_own(byte_level, chatml):
    tokenizer = byte_level(
        chatml.replace("m['content'] +", "m['content'] + (m.tool_calls | tojson if m.tool_calls else '') +")
    )
    turns = [
        {"from": "human", "value": "what?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "it"}}'},
        {"from": "observation", "value": "a dog"},
        {"from": "gpt", "value": "good"},
    ]
    tokens, _ = tokenize([{"conversations": turns}], tokenizer)
    completion = tokenizer.decode(tokens[0]["completion_ids"][0])
    assert completion.startswith('[{"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}]')
    turns[1]["value"] = "look(it)"
    with pytest.raises(DataError, match="'function_call' is not valid JSON"):
        tokenize([{"conversations": turns}], tokenizer)


def test_tools_and_system_turns_are_taken_along(byte_level, chatml):
    tokenizer = byte_level("{% if tools %}{{ tools | tojson }}{% endif %}" + chatml)
    row = {"messages": [user("what?"), assistant("good")], "label": True, "system": "be kind",
           "tools": json.dumps([{"name": "look"}])}  # fmt: skip
    tokens, _ = tokenize([row], tokenizer)
    prompt = tokenizer.decode(tokens[0]["prompt_ids"])
    assert prompt.startswith('[{"name": "look"}]<|im_start|>system\nbe kind<|im_end|>')


def test_an_export_is_joined_and_gives_what_is_wanted(tokenizer):
    for rows in (EXPORT, [{"prompt": TREE}]):
        tokens, report = tokenize(rows, tokenizer, wanted="pairs")
        assert texts(tokenizer, tokens) == PAIR
        assert report.format.startswith("preference")
    tokens, report = tokenize([{"prompt": TREE}], tokenizer, wanted="completions")
    assert texts(tokenizer, tokens) == [("what?", "good|and?|so")]
    assert "the best reply at each turn" in report.layout
    tokens, _ = tokenize(EXPORT, tokenizer, wanted="labelled")
    assert texts(tokenizer, tokens) == [("what?", "good", True), ("what?", "bad", False)]


def test_problems_are_named_by_the_rows_that_were_given(tokenizer):
    lost = {**EXPORT[1], "message_id": "9", "parent_id": "8"}
    more = [{**row, "message_id": "x" + row["message_id"], "parent_id": row["parent_id"] and "x1"} for row in EXPORT]
    more[2]["text"] = " "
    with pytest.raises(DataError, match=r"1 with missing parent \(row 4.*1 with empty completion \(row 5") as error:
        tokenize([*EXPORT, lost, *more], tokenizer)
    assert "2 of 7 rows" in str(error.value)
    with pytest.raises(DataError, match=r"1 of 8 rows are longer .*the longest has 6\d"):
        rows = [{"prompt": "what?", "completions": ["good", "bad"], "scores": [1, 2]}] * 8
        rows[5] = {"prompt": "what?", "completions": ["good", "x1y2" * 15], "scores": [1, 2]}
        tokenize(rows, tokenizer, max_length=50)


def test_rows_without_a_better_answer_are_left_out_and_counted(tokenizer):
    rows = [
        {"prompt": "what?", "completions": ["good", "bad"], "scores": scores} for scores in ([2, 1], [1, 1], [3, 0])
    ]
    tokens, report = tokenize(rows, tokenizer)
    assert texts(tokenizer, tokens) == PAIR * 2
    assert (report.dropped, report.dropped_rows) == ({"no better answer": 1}, {"no better answer": [2]})
    mixed = [*rows, {"prompt": "what?", "completions": ["good"], "scores": [1, 2]}]
    with pytest.raises(DataError, match=r"1 with wrong type \(row 4: needs as many ratings"):
        tokenize(mixed, tokenizer)
    assert tokenize(mixed, tokenizer, on_invalid="drop")[1].dropped == {"wrong type": 1, "no better answer": 1}
    with pytest.raises(DataError, match=r"None of the 1 rows is left .*no row has answers of different value"):
        tokenize(rows[1:2], tokenizer)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 3}, "must be one of"),
        ({"messages": [assistant("a")], "label": True}, "needs an assistant turn behind another turn"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "pairs of question and answer"),
        ({"instruction": "a", "output": "b", "history": "c"}, "pairs of question and answer"),
        ({"prompt": "a", "completions": ["b"], "scores": [1, 2]}, "as many ratings as answers"),
    ],
)
def test_rows_that_do_not_fit_their_layout_are_refused(tokenizer, row, words):
    with pytest.raises(DataError, match=words):
        tokenize([row], tokenizer)


# What a method needs


def test_rows_of_another_kind_are_refused_before_their_lengths(tokenizer):
    pair = {"prompt": "what?", "chosen": " good", "rejected": " bad" * 100}
    label = {"prompt": "what?", "completion": " good" * 100, "label": True}
    chat = {"messages": [user("what?"), assistant("good" * 100)], "label": True}
    for row, wanted, words in (
        (pair, "completions", "'preference, plain strings'; text, messages, or prompt and completion"),
        (label, "completions", "'unpaired, plain strings'; text, messages, or prompt and completion"),
        (label, "pairs", "'unpaired, plain strings'; pairs, with chosen and rejected"),
        (chat, "completions", "layout 'conversation with a label', which gives rows with a label; text, messages"),
        ({"text": "a" * 100}, "labelled", "'text, plain strings'; rows with prompt, completion and label, or pairs"),
    ):
        with pytest.raises(DataError) as error:
            tokenize([row], tokenizer, max_length=10, wanted=wanted)
        assert words in str(error.value)
    with pytest.raises(ConfigError, match="wanted must be one of pairs, labelled, completions or None, found 'dpo'"):
        tokenize([pair], tokenizer, wanted="dpo")


def test_pairs_serve_as_labelled_rows(tokenizer):
    pair = {"prompt": "what?", "chosen": " good", "rejected": " bad"}
    tokens, report = tokenize([pair] * 3, tokenizer, wanted="labelled")
    assert texts(tokenizer, tokens) == [("what?", " good", True), ("what?", " bad", False)] * 3
    assert report.unpaired and "two labelled rows of each pair" in str(report)
    assert (report.rows_in, report.rows_kept, report.completions) == (3, 6, 6)


# Rows as they were understood, which `fastalign data check --out` writes

ROWS = [[row] for _, row, _ in CASES] + [[row] for row, _ in RENAMED] + [EXPORT]


@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: "-".join(rows[0]))
def test_rows_as_understood_give_the_same_tokens(byte_level, tmp_path, rows):
    tokenizer = byte_level()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in understood_rows(load_rows(rows))))
    again, report = tokenize(str(path), tokenizer)
    assert again.to_list() == tokenize(rows, tokenizer)[0].to_list()
    assert report.layout == "" and "from" not in report.format and report.unread_columns == []
