"""What is scored of a conversation: the assistant's words and what ends them, whatever the chat template does.

The templates here are small ones in the shapes of well-known families.
"""

import json
import random
import re

import pytest

from fastalign.data.template import Template, stop_text
from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def each(before, behind, opening, end=""):
    """A template that writes before + role + behind + content for every turn."""
    return (
        "{% for m in messages %}{{ "
        + before
        + " + m.role + "
        + behind
        + " + m.content | trim }}"
        + end
        + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + opening + "' }}{% endif %}"
    )


PHI = each("'<|'", "'|>\n'", "<|assistant|>\n", "{{ '<|end|>\n' }}").replace(
    "{% endif %}", "{% else %}{{ eos_token }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' }}"
    "{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
CUT = (  # thoughts are cut from every answer
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
LAST = (  # thoughts stay with the last answer, and an answer without any gets an empty one
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set words = m.content.split('</think>')[-1] | trim %}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' }}"
    "{{ m.content.split('</think>')[0].split('<think>')[-1] | trim if '</think>' in m.content else '' }}"
    "{{ '\n</think>\n\n' }}{% endif %}{{ words + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = ("<|user|>", "<|assistant|>", "<|end|>", "<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>")
FAMILIES = {  # template, EOS, what ends every answer
    "chatml": (
        each("'<|im_start|>'", "'\n'", "<|im_start|>assistant\n", "{{ '<|im_end|>\n' }}"),
        "<|im_end|>",
        "<|im_end|>",
    ),
    "another eos": (each("'<|start|>'", "'\n'", "<|start|>assistant\n", "{{ '<|end|>\n' }}"), "</s>", "<|end|>"),
    "phi": (PHI, "</s>", "<|end|>"),
    "harmony": (HARMONY, "<|return|>", "<|end|>"),
    "glm": (each("'<|'", "'|>\n'", "<|assistant|>\n"), "</s>", ""),
    "inst": (INST, "</s>", "</s>"),
    "vicuna": (
        each("''", "': '", "assistant: ", "{{ eos_token + '\n' if m.role == 'assistant' else '\n' }}"),
        "</s>",
        "</s>",
    ),
    "zephyr": (each("'\n[['", "']]\n'", "\n[[assistant]]\n", "{{ eos_token }}"), "</s>", "</s>"),
    "cut": (CUT, "</s>", "</s>"),
    "last": (LAST, "<|im_end|>", "<|im_end|>"),
}
SPECIALS = ("</s>", *dict.fromkeys(TURNS))


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, byte_level):
    template, eos, stop = FAMILIES[request.param]
    return request.param, byte_level(template, eos, "<s>", SPECIALS), stop


def scored(tokenizer, row, n=0) -> str:
    ids = row["completion_ids"][n]
    mask = row["completion_mask"][n] if "completion_mask" in row else [1] * len(ids)
    return tokenizer.decode([token for token, kept in zip(ids, mask, strict=True) if kept])


def words(text: str) -> str:
    """Without special tokens, white space and the name of harmony's channel."""
    return re.sub(r"<\|channel\|>final|<[^<>]*>|\s", "", text)


def test_the_text_behind_every_answer_is_found(family):
    _, tokenizer, stop = family
    assert stop_text(Template(tokenizer)) == stop


def test_the_scored_text_is_the_assistants_words_and_end_tokens(family):
    name, tokenizer, stop = family
    chance = random.Random(0)
    vocabulary = ["paris", "the dog", "is it?", "fine.", "yes\nno", "<b>", "4 < 5"]
    speech = lambda: " ".join(chance.choices(vocabulary, k=chance.randint(1, 4)))  # noqa: E731  # used twice below
    conversations = [
        [turn for _ in range(chance.randint(1, 4)) for turn in (user(speech()), assistant(speech()))] for _ in range(30)
    ]
    tokens, report = tokenize([{"messages": turns} for turns in conversations], tokenizer)
    for turns, row in zip(conversations, tokens, strict=True):
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        text = scored(tokenizer, row)
        assert words(text) == words("".join(answers)), name
        assert text.count(stop or tokenizer.eos_token) == (len(answers) - (name == "harmony") if stop else 1)
        assert row["completion_ids"][0][-1] == tokenizer.eos_token_id
    earlier = sum(len(turns) // 2 - 1 for turns in conversations)
    assert report.unstopped_answers == (0 if stop else earlier)
    assert report.answers_cut == 0


SYSTEM_LATE = (  # the system's words stand in the last turn, if that is a user's, as in Mistral v3
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_system_turn_that_is_written_in_the_last_question_alone_stands_where_generation_has_it(byte_level):
    tokenizer = byte_level(SYSTEM_LATE, "</s>", "<s>", SPECIALS)
    turns = [{"role": "system", "content": "be kind "}, user("hello")]
    pair = {"prompt": turns, "chosen": [assistant("fine")], "rejected": [assistant("bad")]}
    for row in (pair, {"messages": [*turns, assistant("fine")]}):
        tokens, report = tokenize([row], tokenizer)
        assert tokenizer.decode(tokens[0]["prompt_ids"]) == "<s>[INST] be kind hello[/INST]"
        assert scored(tokenizer, tokens[0]) == " fine</s>"
        assert report.template_mismatch == 0
    with pytest.raises(DataError, match="the template writes the prompt differently"):
        tokenize([{"messages": [*turns, assistant("fine"), user("and?"), assistant("ok")]}], tokenizer)


THOUGHT = "<think>\nthe dog\n</think>\n\nfine"
LONG = [user("hello"), assistant(THOUGHT), user("and?"), assistant(THOUGHT)]


@pytest.mark.parametrize("name", ["chatml", "phi", "inst", "cut", "last", "harmony"])
def test_the_thoughts_of_the_last_answer_are_scored_and_others_counted(byte_level, name):
    template, eos, _ = FAMILIES[name]
    tokenizer = byte_level(template, eos, "<s>", SPECIALS)
    tokens, report = tokenize([{"messages": LONG}], tokenizer)
    cut = name in ("cut", "last")
    assert words(scored(tokenizer, tokens[0])) == ("fine" if cut else "thedogfine") + "thedogfine"
    assert report.answers_cut == int(cut)
    assert report.thoughts_kept == int(name == "cut")


def test_the_thoughts_of_a_pair_are_scored(byte_level):
    tokenizer = byte_level(CUT, "</s>", None, SPECIALS)
    pair = {"prompt": "hello", "chosen": [assistant(THOUGHT)], "rejected": [assistant("<think>\nno\n</think>\n\nbad")]}
    tokens, report = tokenize([pair], tokenizer)
    # The generation prompt begins the thought, so that the answer goes on behind it.
    assert tokenizer.decode(tokens[0]["prompt_ids"]) == "<|user|>hello<|assistant|><think>\n"
    assert scored(tokenizer, tokens[0]) == "the dog\n</think>\n\nfine</s>"
    assert scored(tokenizer, tokens[0], 1) == "no\n</think>\n\nbad</s>"
    assert (report.thoughts_kept, report.template_mismatch) == (2, 0)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_in_a_key_of_their_own(byte_level, chatml, key):
    row = {"messages": [user("hello"), assistant("fine", **{key: "the dog"})]}
    tokens, report = tokenize([row], byte_level())
    assert scored(byte_level(), tokens[0]) == THOUGHT + "<|im_end|>"
    assert report.thoughts_kept == 1
    known = byte_level(chatml.replace("m['content']", f"(m.{key} or '') + m['content']"))
    assert scored(known, tokenize([row], known)[0][0]) == "the dogfine<|im_end|>"
    earlier = {"messages": [*row["messages"], user("and?"), assistant("ok")]}
    assert tokenize([earlier], byte_level())[1].answers_cut == 1
    assert "1 earlier answers" in str(tokenize([earlier], byte_level())[1])


def test_an_answer_whose_words_a_template_leaves_out_is_refused(byte_level, chatml):
    tokenizer = byte_level(chatml.replace("m['content']", "('' if m.role == 'assistant' else m['content'])"))
    with pytest.raises(DataError, match="the chat template leaves out the words of the last answer"):
        tokenize([{"messages": [user("hello"), assistant("fine")]}], tokenizer)
    closed = byte_level(
        chatml.replace("m['content']", "('<think></think>' if m.role == 'assistant' else '') + m['content']")
    )
    row = {"messages": [user("hello"), assistant("fine", reasoning_content="the dog")]}
    with pytest.raises(DataError, match="the chat template leaves out the thoughts of the last answer"):
        tokenize([row], closed)


# Tool calls

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": "north", "y": None}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversation(arguments) -> list[dict]:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "1", "content": "ok"}
    return [user("open it"), {"role": "assistant", "content": None, "tool_calls": [call]}, result, assistant("fine")]


@pytest.mark.parametrize("arguments", [{"x": "north", "y": None}, '{"x": "north", "y": null}'])
def test_arguments_are_written_once_with_the_nulls_that_were_given(byte_level, arguments):
    tokenizer = byte_level(TOOL_TEMPLATE)
    other = {"messages": conversation({"z": [1, {"deep": None}]}), "tools": TOOLS}
    tokens, _ = tokenize([{"messages": conversation(arguments), "tools": TOOLS}, other], tokenizer)
    assert scored(tokenizer, tokens[0]) == 'f{"x": "north", "y": null}<|im_end|>fine<|im_end|>'
    assert scored(tokenizer, tokens[1]) == 'f{"z": [1, {"deep": null}]}<|im_end|>fine<|im_end|>'
    assert tokenizer.decode(tokens[0]["prompt_ids"]).startswith(json.dumps(TOOLS) + "<|im_start|>")


def test_a_template_that_takes_arguments_as_text_gets_them_as_text(byte_level):
    tokenizer = byte_level(TOOL_TEMPLATE.replace("arguments | tojson", "arguments"))
    tokens, _ = tokenize([{"messages": conversation({"x": "é"})}], tokenizer)
    assert scored(tokenizer, tokens[0]) == 'f{"x": "é"}<|im_end|>fine<|im_end|>'


def test_a_template_that_ignores_tools_or_tool_calls_is_refused(byte_level):
    with pytest.raises(DataError, match="the chat template leaves out the tool calls"):
        tokenize([{"messages": conversation({"x": 1})}], byte_level())
    with pytest.raises(DataError, match="the chat template leaves out the tools"):
        tokenize([{"messages": [user("hello"), assistant("fine")], "tools": TOOLS}], byte_level())


def test_answers_right_after_an_answer_are_counted(byte_level):
    tokenizer, answer = byte_level(), assistant("dog")
    pair = {"prompt": [user("the"), answer], "chosen": [assistant("fox")], "rejected": [assistant("cat")]}
    assert tokenize([pair], tokenizer)[1].answers_in_a_row == 2
    _, report = tokenize([{"messages": [user("the"), answer, answer]}], tokenizer)
    assert report.answers_in_a_row == 1 and "right after another one" in str(report)
    assert not tokenize([{"messages": [user("the"), answer, user("the"), answer]}], tokenizer)[1].answers_in_a_row
