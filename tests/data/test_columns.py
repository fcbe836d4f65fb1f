"""Columns under other names are mapped; columns that change the meaning of a row are honoured or refused."""

import pytest

from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(byte_level):
    return byte_level()


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def texts(tokenizer, row) -> tuple[str, list[str]]:
    end = "<|im_end|>"
    return tokenizer.decode(row["prompt_ids"]), [
        tokenizer.decode(ids).removesuffix(end) for ids in row["completion_ids"]
    ]


PAIR = {"chosen": " paris", "rejected": " the dog"}
CHAT = {"messages": [user("hello"), assistant("fine")]}


@pytest.mark.parametrize(
    ("row", "prompt", "completions"),
    [
        ({"question": "what?", **PAIR}, "what?", [" paris", " the dog"]),
        ({"system": "be kind", "question": "what?", **PAIR}, "be kind\n\nwhat?", [" paris", " the dog"]),
        ({"system": "", "question": "what?", **PAIR}, "what?", [" paris", " the dog"]),
        ({"instruction": "say", "input": "it", **PAIR}, "say\n\nit", [" paris", " the dog"]),
        ({"instruction": "say", "input": "", "output": " it"}, "say", [" it"]),
        ({"instruction": "say", "context": "it", "response": " ok"}, "say\n\nit", [" ok"]),
        ({"query": "what?", "answer": " ok"}, "what?", [" ok"]),
        ({"input": "what?", "output": " ok"}, "what?", [" ok"]),
        ({"question": "what?", "answer": " ok", "label": True}, "what?", [" ok"]),
    ],
)
def test_a_prompt_under_another_name_is_read(tokenizer, row, prompt, completions):
    tokens, report = tokenize([row], tokenizer)
    assert texts(tokenizer, tokens[0]) == (prompt, completions)
    assert report.unread_columns == []


def test_system_becomes_a_turn_where_the_rows_hold_messages(tokenizer):
    system = "<|im_start|>system\nbe kind<|im_end|>\n"
    pair = {"question": "hello", "chosen": [assistant("fine")], "rejected": [assistant("bad")]}
    for row in (CHAT, pair, {**CHAT, "messages": [{"role": "system", "content": "be kind"}, *CHAT["messages"]]}):
        tokens, _ = tokenize([{"system": "be kind", **row}], tokenizer)
        prompt, completions = texts(tokenizer, tokens[0])
        assert prompt == system + "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert completions[0] == "fine"
    other = {"messages": [{"role": "system", "content": "be bad"}, *CHAT["messages"]], "system": "be kind"}
    with pytest.raises(DataError, match="another system turn"):
        tokenize([other], tokenizer)


def test_columns_that_are_not_read_are_named(tokenizer):
    row = {"question": "what?", "prompt_id": "7", "notes": "x", "score": 3.5, **PAIR}
    _, report = tokenize([row], tokenizer)
    assert report.unread_columns == ["prompt_id", "notes", "score"]
    assert "not read: prompt_id, notes, score." in str(report)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", **PAIR, "images": [["x.png"]]}, "'images' holds values: only text is trained on"),
        ({**CHAT, "image": "x.png"}, "'image' holds values: only text is trained on"),
        ({"prompt": "a", **PAIR, "weight": 0.5}, "'weight' holds 0.5: rows are not weighted"),
        ({"prompt": "a", **PAIR, "loss_weight": 2}, "'loss_weight' holds 2: rows are not weighted"),
        ({"prompt": "a", **PAIR, "train": False}, "'train' holds False: rows are not weighted"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "label": 1, "history": [["d", "e"]]}, "'label' would not be"),
        ({"prompt": "a", **PAIR, "tools": [{"name": "f"}]}, "'tools' needs chat messages"),
        ({"prompt": "a", **PAIR, "chat_template_kwargs": {"x": 1}}, "'chat_template_kwargs' needs chat messages"),
    ],
)
def test_columns_that_change_the_meaning_are_refused(tokenizer, row, words):
    with pytest.raises(DataError) as error:
        tokenize([row], tokenizer)
    assert words in str(error.value)


def test_columns_that_change_nothing_are_allowed(tokenizer):
    row = {"prompt": "a", **PAIR, "images": [], "weight": 1.0, "train": True, "tools": [], "history": None}
    tokens, _ = tokenize([row, {**row, "weight": None}], tokenizer)
    assert len(tokens) == 2


def test_template_options_of_a_row_reach_the_template(byte_level, chatml):
    tokenizer = byte_level("{% if loud %}{{ 'LOUD ' }}{% endif %}" + chatml)
    rows = [{**CHAT, "chat_template_kwargs": {"loud": True}}, {**CHAT, "chat_template_kwargs": '{"loud": false}'}, CHAT]
    found = [texts(tokenizer, tokenize([row], tokenizer)[0][0])[0].startswith("LOUD ") for row in rows]
    assert found == [True, False, False]


def test_a_row_without_a_prompt_is_refused_unless_it_is_allowed(tokenizer):
    chat = {"prompt": " ", "chosen": [assistant("fine")], "rejected": [assistant("bad")]}
    for row in ({"chosen": "hello", "rejected": "the"}, {"prompt": "", **PAIR}, {"question": " \n", **PAIR}, chat):
        with pytest.raises(DataError, match=r"1 with no prompt .*allow_empty_prompt=True"):
            tokenize([row], tokenizer)
        tokens, _ = tokenize([row], tokenizer, allow_empty_prompt=True)
        assert len(tokens) == 1
    assert len(tokenize([{"text": "hello"}], tokenizer)[0]) == 1


@pytest.mark.parametrize("key", [{"train": False}, {"weight": 0}, {"weight": 0.0, "train": True}])
def test_answers_with_weight_0_are_not_scored(tokenizer, key):
    turns = [
        user("hello"),
        assistant("fine", **key),
        user("and?"),
        assistant("ok"),
        user("so?"),
        assistant("no", **key),
    ]
    tokens, _ = tokenize([{"messages": turns}], tokenizer)
    ids, mask = tokens[0]["completion_ids"][0], tokens[0]["completion_mask"][0]
    assert tokenizer.decode([token for token, scored in zip(ids, mask, strict=True) if scored]) == "ok<|im_end|>"


def test_weights_of_turns_other_than_0_and_1_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"'weight' of a turn must be 0 or 1, found 0\.5"):
        tokenize([{"messages": [user("hello"), assistant("fine", weight=0.5)]}], tokenizer)
    with pytest.raises(DataError, match="only assistant turns are scored"):
        tokenize([{"messages": [user("hello") | {"train": True}, assistant("fine")]}], tokenizer)
    with pytest.raises(DataError, match="no assistant turn that is scored"):
        tokenize([{"messages": [user("hello"), assistant("fine", train=False)]}], tokenizer)


@pytest.mark.parametrize("more", [{"role": "prompter"}, {"parent_id": "x"}])
def test_a_flat_export_of_a_message_tree_is_not_text(tokenizer, more):
    with pytest.raises(DataError, match="one message per row"):
        tokenize([{"text": "hello", **more}], tokenizer)


@pytest.mark.parametrize(("column", "value"), [("is_chosen", False), ("rating", 1), ("tie", True), ("label", 0.5)])
def test_numbers_and_truth_values_that_are_not_read_are_named(tokenizer, column, value):
    key = "text" if column == "label" else "completion"
    rows = [{key: "paris", column: value} | ({} if key == "text" else {"prompt": "q"})]
    _, report = tokenize(rows, tokenizer)
    assert report.unread_columns == [column]


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("Chosen_Rating", "Rejected_Rating")])
def test_pairs_whose_chosen_answer_has_the_lower_score_are_counted(tokenizer, names):
    scores = [(9, 1), (1, 9.5), (3, 3), (None, 2)]
    rows = [{"question": "what?", **PAIR, **dict(zip(names, pair, strict=True))} for pair in scores]
    as_text = [{key: str(value) for key, value in row.items()} for row in rows]
    assert tokenize(as_text, tokenizer)[1].lower_scores == 1
    _, report = tokenize(rows, tokenizer)
    assert report.lower_scores == 1 and "1 pairs have a chosen answer with a lower score" in str(report)
