"""Which parts of an answer a text lacks."""

from collections import Counter

import pytest

from fastalign.data.answers import missing_parts, whole_text
from fastalign.data.messages import RowProblem
from fastalign.data.template import Template

THOUGHT = "<think>\nthe dog\n</think>\n\nfine"


@pytest.mark.parametrize(
    ("answer", "text", "missing"),
    [
        ({"content": "it  is\nfine"}, "it is fine<|im_end|>", []),
        ({"content": "fine"}, "<|im_end|>", ["words"]),
        ({"content": THOUGHT}, "fine", ["thoughts"]),
        ({"content": THOUGHT}, "the dog", ["words"]),
        ({"content": "<think></think>fine"}, "fine", []),
        ({"content": "fine", "thinking": "the dog"}, "fine", ["thoughts"]),
        ({"content": "fine", "reasoning_content": "the dog"}, "<think>the dog</think>fine", []),
        ({"content": "", "tool_calls": [{"function": {"name": "f_1"}}, {"name": "g_1"}]}, "f_1()", ["tool calls"]),
    ],
)
def test_missing_parts_are_named(answer, text, missing):
    assert missing_parts({"role": "assistant", **answer}, text) == missing


def test_a_missing_tool_call_is_not_put_in(byte_level):
    turns = [{"role": "user", "content": "hello"}]
    turns.append({"role": "assistant", "content": "fine", "tool_calls": [{"name": "f_1"}]})
    template = Template(byte_level())
    with pytest.raises(RowProblem, match="tool calls of the last answer"):
        whole_text(template(turns), 0, turns, template, Counter())
