"""What a chat template writes behind answers, and where two texts part."""

import pytest

from fastalign.data.messages import RowProblem
from fastalign.data.template import Template, shared_length, stop_text


def test_a_new_chat_template_has_its_own_stop_text(byte_level, chatml):
    tokenizer = byte_level()
    assert stop_text(Template(tokenizer)) == "<|im_end|>"
    tokenizer.chat_template = chatml.replace("<|im_end|>", "</think>")
    assert stop_text(Template(tokenizer)) == "</think>"
    tokenizer.chat_template = chatml.replace("<|im_end|>", "")
    assert stop_text(Template(tokenizer)) == ""  # <|im_start|> belongs to the next turn


def test_a_template_that_refuses_another_question_is_taken_to_end_with_eos(byte_level, chatml):
    guard = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    assert stop_text(Template(byte_level(guard + chatml))) == "<|im_end|>"


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [("abc", "abd", 2), ("abc", "ab", 2), ("a<|im_end|>", "a<|im_start|>", 1), ("a<|im_end|>b", "a<|im_end|>c", 11)],
)
def test_no_special_token_is_cut_in_two(byte_level, one, other, shared):
    assert shared_length(one, other, byte_level()) == shared


def test_options_reach_the_template_and_errors_are_one_sentence(byte_level):
    template = Template(byte_level("{% if loud %}{{ 'LOUD' }}{% endif %}{{ messages[0].content + 1 }}"))
    with pytest.raises(RowProblem, match="the chat template refuses it"):
        template([{"role": "user", "content": "a"}])
    assert Template(byte_level("{{ loud }}"), None, {"loud": 3})([{"role": "user", "content": "a"}]) == "3"
