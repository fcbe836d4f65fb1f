"""Messages as people write them: as JSON text, with other names for keys and roles, with tool calls."""

import json

import pytest

from fastalign.data.messages import read_messages
from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(byte_level):
    return byte_level()


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


TURNS = [user("hello"), assistant("fine")]
SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "fine"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": json.dumps(TURNS)},
        {"messages": " " + json.dumps(TURNS, indent=1)},
        {"conversations": SHAREGPT},
        {"conversations": json.dumps(SHAREGPT)},
        {"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:])},
        {"prompt": "hello", "completion": json.dumps([{"content": "fine", "role": "assistant"}])},
        {"messages": [{"role": "human", "content": "hello"}, {"role": "gpt", "content": "fine"}]},
        {"messages": [user([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]), assistant("fine")]},
        {"prompt": "hello", "completion": assistant("fine")},
    ],
)
def test_messages_of_any_spelling_give_the_same_tokens(tokenizer, row):
    assert tokenize([row], tokenizer)[0].to_list() == tokenize([{"messages": TURNS}], tokenizer)[0].to_list()


def test_pairs_as_json_text(tokenizer):
    row = {"prompt": "hello", "chosen": json.dumps([assistant("fine")]), "rejected": json.dumps([assistant("bad")])}
    tokens, report = tokenize([row], tokenizer)
    assert report.format.startswith("preference, chat")
    assert [tokenizer.decode(ids) for ids in tokens[0]["completion_ids"]] == ["fine<|im_end|>", "bad<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": str(TURNS)}, "'messages' holds messages as Python prints them: write them as JSON"),
        ({"prompt": "a", "chosen": str(TURNS), "rejected": "b"}, "as Python prints them: write them as JSON"),
        ({"messages": json.dumps(TURNS)[:-3]}, "'messages' begins like JSON text of messages, but is not valid JSON"),
        ({"messages": [user([{"type": "image", "url": "x"}]), assistant("a")]}, "a part of type 'image': only text"),
        ({"conversations": [{"from": "narrator", "value": "{}"}]}, "unknown speaker 'narrator'"),
    ],
)
def test_text_that_is_nearly_messages_is_refused(tokenizer, row, words):
    with pytest.raises(DataError) as error:
        tokenize([row], tokenizer)
    assert words in str(error.value)


def test_json_text_in_a_later_row_of_plain_strings_is_refused(tokenizer):
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": json.dumps(TURNS[1:])}]
    with pytest.raises(DataError, match="row 2: 'completion' holds messages, while the first row holds plain text"):
        tokenize(rows, tokenizer)


def test_other_json_text_stays_text(tokenizer):
    answer = '[{"content": 3, "unit": "cm"}]'
    tokens, report = tokenize([{"prompt": "a", "completion": answer}], tokenizer)
    assert report.format.endswith("plain strings")
    assert tokenizer.decode(tokens[0]["completion_ids"][0]) == answer + "<|im_end|>"


def test_arguments_given_as_json_text_are_parsed():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": null, "y": [1]}'}}
    (message,) = read_messages([assistant(None, tool_calls=[call])], "assistant", "messages")
    assert message["tool_calls"][0]["function"]["arguments"] == {"x": None, "y": [1]}
