"""Rows of every known format become one prompt and its completions; what is wrong with a row is named."""

import json
import sys

import datasets
import pytest

from fastalign.data.tokenization import tokenize
from fastalign.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(byte_level):
    return byte_level()


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def texts(tokenizer, row) -> tuple[str, list[str]]:
    return tokenizer.decode(row["prompt_ids"]), [tokenizer.decode(ids) for ids in row["completion_ids"]]


def scored_text(tokenizer, row) -> str:
    ids, mask = row["completion_ids"][0], row["completion_mask"][0]
    assert len(ids) == len(mask)
    return tokenizer.decode([token for token, scored in zip(ids, mask, strict=True) if scored])


CHAT_PROMPT = "<|im_start|>user\nwhat is the capital?<|im_end|>\n<|im_start|>assistant\n"
QUESTION = user("what is the capital?")
PAIR = {"chosen": [QUESTION, assistant("paris")], "rejected": [QUESTION, assistant("the dog")]}

# Formats

PLAIN = "what is the capital?"


@pytest.mark.parametrize(
    ("row", "name", "prompt", "completions"),
    [
        ({"prompt": PLAIN, "chosen": " paris", "rejected": " dog"}, "preference, plain", PLAIN, [" paris", " dog"]),
        (
            {"chosen": PLAIN + "\n\nA: hello you", "rejected": PLAIN + "\n\nA: hey"},
            "preference with implicit prompt, plain",
            PLAIN + "\n\nA:",
            [" hello you", " hey"],
        ),
        ({"prompt": PLAIN, "completion": " paris"}, "prompt-completion, plain", PLAIN, [" paris"]),
        ({"prompt": PLAIN, "completion": " paris", "label": True}, "unpaired, plain", PLAIN, [" paris"]),
        ({"text": "the dog"}, "text, plain", "", ["the dog"]),
        ({"messages": PAIR["chosen"]}, "messages, chat", CHAT_PROMPT, ["paris"]),
        (PAIR, "preference with implicit prompt, chat", CHAT_PROMPT, ["paris", "the dog"]),
        (
            {"prompt": [QUESTION], "chosen": [assistant("paris")], "rejected": [assistant("the dog")]},
            "preference, chat",
            CHAT_PROMPT,
            ["paris", "the dog"],
        ),
        # Conversations that repeat a prompt given beside them, and mixtures of strings and messages, as data sets have.
        ({"prompt": PLAIN, **PAIR}, "preference, chat", CHAT_PROMPT, ["paris", "the dog"]),
        ({"prompt": [QUESTION], **PAIR}, "preference, chat", CHAT_PROMPT, ["paris", "the dog"]),
        (
            {"prompt": [QUESTION], "chosen": "paris", "rejected": "dog"},
            "preference, chat",
            CHAT_PROMPT,
            ["paris", "dog"],
        ),
        ({"prompt": [QUESTION], "completion": [assistant("paris")]}, "prompt-completion, chat", CHAT_PROMPT, ["paris"]),
        (
            {"prompt": [QUESTION], "completion": [assistant("paris")], "label": False},
            "unpaired, chat",
            CHAT_PROMPT,
            ["paris"],
        ),
        ({"prompt": None, "chosen": "the dog", "rejected": "the fox"}, "preference with", "the", [" dog", " fox"]),
    ],
)
def test_each_format_becomes_prompt_and_completions(tokenizer, row, name, prompt, completions):
    tokens, report = tokenize([row], tokenizer)
    assert report.format.startswith(name)
    assert texts(tokenizer, tokens[0]) == (prompt, [text + "<|im_end|>" for text in completions])
    assert ("label" in tokens.column_names) == ("label" in row)
    assert "completion_mask" not in tokens.column_names
    assert report.token_merges == 0


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", " TRUE ", "1"])
def test_labels_of_any_spelling(tokenizer, value):
    tokens, _ = tokenize([{"prompt": "a", "completion": " b", "label": value}] * 2, tokenizer)
    assert tokens["label"][:] == [True, True]


def test_the_features_are_compact(tokenizer):
    tokens, _ = tokenize([{"prompt": "a", "completion": " b", "label": False}], tokenizer)
    inner = datasets.List(datasets.Value("int32"))
    assert tokens.features == {
        "prompt_ids": inner,
        "completion_ids": datasets.List(inner),
        "label": datasets.Value("bool"),
    }


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("the dog", "the dog sleeps", "the"),  # neither completion may end up empty
        ("the dog ", "the dog\nsleeps", "the"),
        ("hello", "help", ""),  # never inside a word
        ("the  fox", "the  dog", "the"),  # before the white space, not in it
        ("the dog, yes", "the dog no", "the"),
    ],
)
def test_the_implicit_prompt_of_strings_ends_before_a_space(tokenizer, chosen, rejected, prompt):
    tokens, _ = tokenize([{"chosen": chosen, "rejected": rejected}], tokenizer, allow_empty_prompt=True)
    wanted = [text[len(prompt) :] + "<|im_end|>" for text in (chosen, rejected)]
    assert texts(tokenizer, tokens[0]) == (prompt, wanted)


TRANSCRIPT = "\n\nHuman: hello\n\nAssistant: hey\n\nHuman: and?\n\nAssistant:"


@pytest.mark.parametrize(
    "head",
    [
        TRANSCRIPT,
        "Q: hello\nA:",
        "### Instruction:\nsay\n\n### Response:",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
        "[INST] hello [/INST]",
    ],
)
def test_the_implicit_prompt_of_a_transcript_ends_behind_its_last_turn_marker(tokenizer, head):
    answers = [" the dog is fine", " the dog is there"]
    rows = [{"chosen": head + answers[0], "rejected": head + answers[1]}]
    tokens, report = tokenize([*rows, {"chosen": head + " yes", "rejected": head + " no"}], tokenizer)
    assert texts(tokenizer, tokens[0]) == (head, [text + "<|im_end|>" for text in answers])
    assert (report.shared_words, report.unmarked_prompts) == (1, 0)
    assert "1 pairs without a prompt column have answers that begin with the same words" in str(report)


def test_implicit_prompts_without_a_turn_marker_are_counted(tokenizer):
    _, report = tokenize([{"chosen": "the A: dog is fine", "rejected": "the A: dog is there"}], tokenizer)
    assert (report.shared_words, report.unmarked_prompts) == (0, 1)


def test_plain_strings_on_a_chat_model_are_pointed_out_and_can_become_messages(byte_level):
    row = {"system": "be kind", "instruction": "say", "input": "it", "chosen": "fine", "rejected": "bad"}
    tokenizer = byte_level()
    _, report = tokenize([row], tokenizer)
    assert report.plain_on_chat and "apply_chat_template=True" in str(report)
    tokens, report = tokenize([row], tokenizer, apply_chat_template=True)
    turns = [{"role": "system", "content": "be kind"}, user("say\n\nit")]
    messages = {"prompt": turns, "chosen": [assistant("fine")], "rejected": [assistant("bad")]}
    assert tokens.to_list() == tokenize([messages], tokenizer)[0].to_list()
    assert not report.plain_on_chat
    assert not tokenize([row], byte_level(template=None))[1].plain_on_chat
    assert not tokenize([{"text": "hello"}], tokenizer)[1].plain_on_chat
    for row in ({"text": "hello"}, {"chosen": "the dog", "rejected": "the fox"}):
        with pytest.raises(ConfigError, match="apply_chat_template needs rows with a prompt"):
            tokenize([row], tokenizer, apply_chat_template=True)


def test_the_implicit_prompt_of_a_long_conversation_reaches_to_where_it_parts(tokenizer):
    shared = [QUESTION, assistant("paris"), user("and the dog?")]
    tokens, _ = tokenize([{"chosen": [*shared, assistant("ok")], "rejected": [*shared, assistant("no")]}], tokenizer)
    prompt, completions = texts(tokenizer, tokens[0])
    assert prompt.count("<|im_start|>") == 4
    assert completions == ["ok<|im_end|>", "no<|im_end|>"]


def test_only_assistant_turns_of_messages_are_scored(tokenizer):
    turns = [QUESTION, assistant("paris"), user("and the dog?"), assistant("it sleeps"), user("thanks")]
    tokens, report = tokenize([{"messages": turns}, {"messages": turns[:2]}], tokenizer)
    assert scored_text(tokenizer, tokens[0]) == "paris<|im_end|>it sleeps<|im_end|>"
    assert tokenizer.decode(tokens[0]["completion_ids"][0]).endswith("it sleeps<|im_end|>")  # the thanks are left out
    assert scored_text(tokenizer, tokens[1]) == "paris<|im_end|>"
    assert report.scored_tokens == sum(sum(map(sum, row["completion_mask"])) for row in tokens)
    assert report.eos_inside == 0


THINKING = (  # thoughts stay with the last answer alone, as in Qwen3
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_drops_earlier_thoughts_still_gives_the_mask(byte_level):
    tokenizer = byte_level(THINKING)
    turns = [QUESTION, assistant("paris"), user("and the dog?"), assistant("it sleeps")]
    tokens, report = tokenize([{"messages": turns}], tokenizer)
    assert scored_text(tokenizer, tokens[0]) == "paris<|im_end|><think></think>it sleeps<|im_end|>"
    assert report.template_mismatch == 0


def test_a_generation_prompt_that_no_answer_begins_with_is_counted(byte_level, chatml):
    tokenizer = byte_level(chatml.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"))
    tokens, report = tokenize([PAIR], tokenizer)
    assert texts(tokenizer, tokens[0]) == (CHAT_PROMPT, ["paris<|im_end|>", "the dog<|im_end|>"])
    assert report.template_mismatch == 1


def test_a_template_that_rewrites_the_prompt_is_refused(byte_level, chatml):
    tokenizer = byte_level("{{ messages | length }}" + chatml)
    with pytest.raises(DataError, match="the template writes the prompt differently"):
        tokenize([PAIR], tokenizer)


def test_tool_calls_tools_and_extra_keys_reach_the_template(byte_level):
    template = (
        "{% if tools %}{{ tools[0]['name'] + ' ' }}{% endif %}"
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
        "{% if m.tool_calls is defined %}{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}"
        "{{ m.mood }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = byte_level(template)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    turns = [{**QUESTION, "mood": "sad"}, call, {"role": "tool", "content": "2"}, assistant("paris")]
    tools = [{"name": "dog"}]
    rows = [{"messages": turns, "tools": tools}, {"messages": PAIR["chosen"]}]
    for given in (rows, [{**rows[0], "tools": json.dumps(tools)}, rows[1]]):
        tokens, _ = tokenize(given, tokenizer)
        assert texts(tokenizer, tokens[0])[0] == "dog user:what is the capital?sad<|im_end|>\nassistant:"
        assert scored_text(tokenizer, tokens[0]) == '{"x": 1}<|im_end|>paris<|im_end|>'
        assert texts(tokenizer, tokens[1]) == (
            "user:what is the capital?<|im_end|>\nassistant:",
            ["paris<|im_end|>"],
        )


def test_conversations_win_over_a_prompt_string_that_they_repeat_behind_a_system_turn(tokenizer):
    row = {"prompt": PLAIN, **{name: [{"role": "system", "content": "be kind"}, *PAIR[name]] for name in PAIR}}
    tokens, _ = tokenize([row], tokenizer)
    assert texts(tokenizer, tokens[0])[0] == "<|im_start|>system\nbe kind<|im_end|>\n" + CHAT_PROMPT


def test_a_prompt_string_that_the_conversations_do_not_hold_is_refused(tokenizer):
    with pytest.raises(DataError, match="the prompt is not in the conversations"):
        tokenize([{"prompt": "Answer in one word.", **PAIR}], tokenizer)


def test_a_tool_call_alone_is_an_answer(byte_level, chatml):
    tokenizer = byte_level(chatml.replace("m['content'] +", "m['content'] + (m.tool_calls | tojson) +"))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "dog"}]}
    tokens, _ = tokenize([{"prompt": [{**QUESTION, "tool_calls": []}], "completion": [call]}], tokenizer)
    assert texts(tokenizer, tokens[0])[1] == ['[{"name": "dog"}]<|im_end|>']


# Bad conversations, labels and columns

CHAT_BAD = [
    ([QUESTION, assistant(" ")], "the last assistant turn holds no text"),
    ([QUESTION, assistant([])], "the last assistant turn holds no text"),
    ([QUESTION], "no assistant turn"),
    ([assistant("paris")], "put a user or system turn before it"),
    ([], "must be a non-empty list of messages"),
    ("hello", "must be a non-empty list of messages, found 'hello'"),
    ([None], "needs messages with 'role' and 'content', found None"),
    ([{"who": "human", "text": "x"}], "needs messages with 'role' and 'content', found {"),
    ([{"role": None, "content": None}], "needs messages with 'role' and 'content'"),
    ([user({"a": 1}), assistant("x")], "has a message whose content is {'a': 1}"),
    ([user(["parts"]), assistant("x")], "the chat template refuses it: "),
]


@pytest.mark.parametrize(("turns", "words"), CHAT_BAD)
def test_a_bad_conversation_is_refused(tokenizer, turns, words):
    good = {"messages": PAIR["chosen"]}
    with pytest.raises(DataError, match="1 of 2 rows cannot be used") as error:
        tokenize([good, {"messages": turns}], tokenizer)
    assert words in str(error.value)
    assert "(row 2: " in str(error.value)


def test_messages_nested_too_deeply_are_refused(tokenizer):
    deep = "x"
    for _ in range(900):
        deep = [deep]
    before = sys.getrecursionlimit()  # which a compiler in this process may have raised
    sys.setrecursionlimit(1000)
    try:
        with pytest.raises(DataError, match="nested too deeply"):
            tokenize([{"messages": [{**QUESTION, "extra": deep}, assistant("x")]}], tokenizer)
    finally:
        sys.setrecursionlimit(before)


def test_halves_without_a_shared_prompt_are_refused(tokenizer):
    with pytest.raises(DataError, match="1 with no shared prompt"):
        tokenize([{**PAIR, "rejected": [user("else"), assistant("x")]}], tokenizer)


@pytest.mark.parametrize("label", [float("nan"), 2, "yes", 10**18, 0.5])
def test_labels_that_are_neither_true_nor_false_are_refused(tokenizer, label):
    with pytest.raises(DataError, match=r"(row 1: 'label' must be true or false, found )|(missing field)"):
        tokenize([{"prompt": "a", "completion": " b", "label": label}], tokenizer)


def test_unknown_columns_are_named(tokenizer):
    with pytest.raises(DataError, match=r"has the columns title, body, and one of these .*prompt/chosen/rejected"):
        tokenize([{"title": "a", "body": "b"}], tokenizer)
