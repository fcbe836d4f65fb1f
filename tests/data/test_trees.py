"""Trees of messages become pairs of ranked answers, or one conversation of the best replies."""

import pytest

from fastalign.data import trees
from fastalign.data.messages import RowProblem


def message(text, role, rank=None, replies=(), **more):
    return {"text": text, "role": role, "rank": rank, "replies": [*replies], **more}


def turn(role, content):
    return {"role": role, "content": content}


MORE = message("more?", "prompter", 0, [message("gray", "assistant", 1), message("black", "assistant", 0)])
TREE = message(
    "a colour?",
    "prompter",
    None,
    [
        message("red", "assistant", 1, [message("why?", "prompter", None, [message("so", "assistant", None)])]),
        message("blue", "assistant", 0, [MORE]),
        message("mauve", "assistant", 2, deleted=True),
        message("puce", "assistant", 3, review_result=False),
    ],
)


def test_each_question_with_ranked_answers_gives_a_pair():
    first = [turn("prompter", "a colour?")]
    second = [*first, turn("assistant", "blue"), turn("prompter", "more?")]
    assert trees.pairs({"prompt": TREE}) == [
        {"prompt": first, "chosen": [turn("assistant", "blue")], "rejected": [turn("assistant", "red")]},
        {"prompt": second, "chosen": [turn("assistant", "black")], "rejected": [turn("assistant", "gray")]},
    ]
    assert trees.pairs({"prompt": message("a", "prompter", None, [message("b", "assistant", None)] * 2)}) == []


def test_a_conversation_follows_the_best_replies_up_to_the_last_answer():
    texts = ["a colour?", "blue", "more?", "black"]
    assert [turn["content"] for turn in trees.conversation({"prompt": TREE})[0]["messages"]] == texts
    open_end = message("a", "prompter", None, [message("b", "assistant", 0, [message("c", "prompter")])])
    assert [turn["content"] for turn in trees.conversation({"prompt": open_end})[0]["messages"]] == ["a", "b"]
    assert trees.conversation({"prompt": message("a", "prompter")}) == []


def test_an_export_of_messages_is_joined_to_trees():
    flat = [
        {"message_id": "2", "parent_id": "1", "text": "red", "role": "assistant", "rank": 1},
        {"message_id": "1", "parent_id": None, "text": "a colour?", "role": "prompter", "rank": None},
        {"message_id": "3", "parent_id": "1", "text": "blue", "role": "assistant", "rank": 0},
        {"message_id": "5", "parent_id": "4", "text": "lost", "role": "assistant", "rank": 0},
    ]
    (number, tree), (other, orphan) = trees.join(enumerate(flat, start=1))
    assert (number, other) == (2, 4)
    assert trees.pairs(tree)[0]["chosen"] == [turn("assistant", "blue")]
    with pytest.raises(RowProblem, match="its parent '4' is not among the messages of a tree"):
        trees.pairs(orphan)


def test_messages_that_answer_each_other_in_a_circle_are_refused():
    flat = [
        {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"},
        {"message_id": "2", "parent_id": "3", "text": "b", "role": "assistant"},
        {"message_id": "3", "parent_id": "2", "text": "c", "role": "prompter"},
    ]
    joined = trees.join(enumerate(flat, start=1))
    assert [number for number, row in joined if "orphan" in row] == [2, 3]


def test_two_messages_of_one_id_are_refused():
    flat = [{"message_id": "1", "parent_id": None, "text": text, "role": "prompter"} for text in "ab"]
    joined = trees.join(enumerate(flat, start=1))
    assert [number for number, row in joined if "twice" in row] == [2]
    with pytest.raises(RowProblem, match="an earlier message has the id '1'"):
        trees.conversation(joined[1][1])


def test_what_is_no_tree_is_refused():
    assert trees.is_tree(TREE) and not trees.is_tree({"text": "a"}) and not trees.is_tree("a")
    with pytest.raises(RowProblem, match="needs a message with 'text' and 'replies'"):
        trees.pairs({"prompt": "a"})
    with pytest.raises(RowProblem, match="needs a 'role'"):
        trees.pairs({"prompt": {"text": "a", "replies": []}})
