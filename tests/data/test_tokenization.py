import json
import re
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastalign.data.files import load_rows
from fastalign.data.tokenization import BATCH_ROWS, tokenize
from fastalign.errors import ConfigError, DataError, ModelError

TRAINING_TEXT = [
    "the quick brown fox jumps over the lazy dog and the dog sleeps",
    "what is the capital of france? paris is the capital of france.",
    "system user assistant hello there, how are you today? \n\n fine",
] * 20
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def byte_level(template=CHATML, eos="<|im_end|>", bos=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    wrapped.chat_template = template
    return wrapped


def metaspace() -> PreTrainedTokenizerFast:
    """Like SentencePiece models of the Llama 2 kind: a space is put before a text's first word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*TRAINING_TEXT, "Q: A:\n"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture(scope="module")
def bos_tokenizer():
    return byte_level(bos="<s>")


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


# Loading


def write(tmp_path, name, content: bytes | str):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = [{"prompt": "a, b", "completion": 'say "hi"\n'}, {"prompt": "ü\u2028", "completion": "2"}]


def test_each_file_type_gives_the_same_rows(tmp_path):
    jsonl = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
    paths = [
        write(tmp_path, "a.jsonl", jsonl),
        write(tmp_path, "a.JSON", json.dumps(ROWS)),
        write(tmp_path, "a.csv", 'prompt,completion\n"a, b","say ""hi""\n"\n\nü\u2028,2\n'),
    ]
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in [*paths, str(tmp_path / "a.parquet"), ROWS]:
        assert load_rows(path).to_list() == ROWS, path


def test_a_dataset_is_returned_as_it_is():
    rows = datasets.Dataset.from_list(ROWS)
    assert load_rows(rows) is rows


def test_a_field_of_a_later_row_is_kept():
    assert load_rows([{"text": "a"}, {"text": "b", "note": "c"}]).to_list()[1] == {"text": "b", "note": "c"}


def test_a_cell_over_128_kib_is_read(tmp_path):
    assert len(load_rows(write(tmp_path, "a.csv", "text\n" + "x" * 200_000))[0]["text"]) == 200_000


def test_nothing_is_written_to_the_cache(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenize(write(tmp_path, "a.jsonl", json.dumps(PAIR)), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", GOOD + b"\n" + b'{"text": "b"\n' + GOOD, "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl, line 2: not valid UTF-8 (byte 11): save the file as UTF-8"),
        ("a.jsonl", GOOD + b"[1]\n", "a.jsonl, line 2: expected an object, found list"),
        ("a.jsonl", GOOD + b'{"id": ' + b"1" * 5000 + b"}", "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", GOOD + b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl, line 1: not valid UTF-8"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}', "row 2 has a value in 'text' that no table can hold"),
        ("a.jsonl", GOOD + b'{"id": 1' + b"0" * 30 + b"}", "row 2 has a value in 'id' that no table can hold"),
        ("a.jsonl", b"\n\n", "a.jsonl holds no rows"),
        ("a.json", GOOD * 2, "if it has one object per line, name it .jsonl"),
        ("a.json", b'{"data": []}', "a.json: expected a list, found dict"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json, row 2: expected a dict, found int"),
        ("a.csv", b"text,label\na,1\nb\n", "a.csv, line 3: 1 cells where the header names 2 columns"),
        ("a.csv", b'text\n"a" b\n', "a.csv, line 2: not valid CSV"),
        ("a.csv", b"text\n\xff\n", "a.csv: not valid UTF-8"),
        ("a.csv", b"text\n", "a.csv holds no rows"),
        ("a.csv", b"text,text\na,b\n", "a.csv names the column 'text' twice"),
        ("a.parquet", b"PAR1 not really", "a.parquet: not a readable Parquet file"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.txt", b"x", "unknown extension '.txt', expected one of .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(tmp_path, name, content, words):
    with pytest.raises(DataError) as error:
        load_rows(write(tmp_path, name, content))
    assert words in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("someone/some-dataset", "Only local files are read here"),
        ([], "holds no rows"),
        ([{"text": "a"}, "b"], "row 2: expected a dict, found str"),
        (3, "not from int"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "choose one of its splits ['train']"),
    ],
)
def test_other_sources_are_refused(source, words):
    with pytest.raises(DataError, match=re.escape(words)):
        load_rows(source)


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
    tokens, _ = tokenize([{"chosen": chosen, "rejected": rejected}], tokenizer)
    wanted = [text[len(prompt) :] + "<|im_end|>" for text in (chosen, rejected)]
    assert texts(tokenizer, tokens[0]) == (prompt, wanted)


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


def test_a_template_that_drops_earlier_thoughts_still_gives_the_mask():
    tokenizer = byte_level(THINKING)
    turns = [QUESTION, assistant("paris"), user("and the dog?"), assistant("it sleeps")]
    tokens, report = tokenize([{"messages": turns}], tokenizer)
    assert scored_text(tokenizer, tokens[0]) == "paris<|im_end|><think></think>it sleeps<|im_end|>"
    assert report.template_mismatch == 0


def test_a_generation_prompt_that_no_answer_begins_with_is_counted():
    tokenizer = byte_level(CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"))
    tokens, report = tokenize([PAIR], tokenizer)
    prompt = CHAT_PROMPT.removesuffix("<|im_start|>assistant\n")
    assert texts(tokenizer, tokens[0]) == (
        prompt,
        ["<|im_start|>assistant\nparis<|im_end|>", "<|im_start|>assistant\nthe dog<|im_end|>"],
    )
    assert report.template_mismatch == 1


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = byte_level("{{ messages | length }}" + CHATML)
    with pytest.raises(DataError, match="the template writes the prompt differently"):
        tokenize([PAIR], tokenizer)


def test_tool_calls_tools_and_extra_keys_reach_the_template():
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


def test_a_tool_call_alone_is_an_answer():
    tokenizer = byte_level(CHATML.replace("m['content'] +", "m['content'] + (m.tool_calls | tojson) +"))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "dog"}]}
    tokens, _ = tokenize([{"prompt": [{**QUESTION, "tool_calls": []}], "completion": [call]}], tokenizer)
    assert texts(tokenizer, tokens[0])[1] == ['[{"name": "dog"}]<|im_end|>']


# EOS, BOS and merges


@pytest.mark.parametrize("ending", ["", "<|im_end|>", "<|im_end|><|im_end|>", "<|im_end|>\n", " <|im_end|> \n"])
def test_eos_ends_each_completion_exactly_once(tokenizer, ending):
    tokens, report = tokenize([{"prompt": "a", "chosen": " paris" + ending, "rejected": " dog"}], tokenizer)
    chosen, rejected = tokens[0]["completion_ids"]
    for ids in (chosen, rejected):
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
    assert (report.eos_present, report.eos_added) == ((1, 1) if ending else (0, 2))


def test_a_template_whose_turns_do_not_end_with_eos_gets_one():
    tokenizer = byte_level(eos="</think>")
    tokens, report = tokenize([PAIR], tokenizer)
    assert texts(tokenizer, tokens[0])[1] == ["paris<|im_end|></think>", "the dog<|im_end|></think>"]
    assert (report.eos_present, report.eos_added) == (0, 2)


def test_an_eos_written_inside_a_completion_is_counted(tokenizer):
    _, report = tokenize([{"prompt": "a", "completion": " the<|im_end|> dog"}], tokenizer)
    assert report.eos_inside == 1


@pytest.mark.parametrize(("prompt", "duplicates"), [("the dog", 0), ("<s>the dog", 1), ("<s><s>the dog", 1), ("", 0)])
def test_bos_starts_a_string_prompt_exactly_once(bos_tokenizer, prompt, duplicates):
    tokens, report = tokenize([{"prompt": prompt, "chosen": " a", "rejected": " b"}], bos_tokenizer)
    bare = bos_tokenizer(prompt.replace("<s>", ""), add_special_tokens=False)["input_ids"]
    assert tokens[0]["prompt_ids"] == [bos_tokenizer.bos_token_id, *bare]
    assert report.duplicate_bos == duplicates
    assert all(bos_tokenizer.bos_token_id not in ids for ids in tokens[0]["completion_ids"])


@pytest.mark.parametrize("text", ["the dog", "<s>the dog"])
def test_bos_of_plain_text_is_its_prompt(bos_tokenizer, text):
    tokens, report = tokenize([{"text": text}], bos_tokenizer)
    assert texts(bos_tokenizer, tokens[0]) == ("<s>", ["the dog<|im_end|>"])
    assert report.duplicate_bos == int(text.startswith("<s>"))
    assert report.scored_tokens == len(tokens[0]["completion_ids"][0])  # BOS predicts the first


@pytest.mark.parametrize("written", [True, False])
def test_bos_of_a_chat_template_is_not_doubled(written):
    tokenizer = byte_level("{{ bos_token }}" * written + CHATML, bos="<s>")
    tokens, report = tokenize([PAIR], tokenizer)
    assert texts(tokenizer, tokens[0])[0] == "<s>" + CHAT_PROMPT
    assert report.duplicate_bos == int(written)


def test_a_tokenizer_that_adds_no_bos_gets_none(tokenizer):
    tokens, report = tokenize([{"prompt": "<|im_start|><|im_start|>a", "completion": " b"}], tokenizer)
    assert tokens[0]["prompt_ids"][:2] == [tokenizer.convert_tokens_to_ids("<|im_start|>")] * 2
    assert report.duplicate_bos == 0


def test_merges_are_counted_and_prompt_tokens_stay_those_of_generation(tokenizer):
    row = {"prompt": "what is the ", "chosen": "capital", "rejected": "42"}
    tokens, report = tokenize([row], tokenizer)
    assert tokens[0]["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
    for ids, name in zip(tokens[0]["completion_ids"], ("chosen", "rejected"), strict=True):
        assert ids[:-1] == tokenizer(row[name])["input_ids"]
    whole = {name: tokenizer(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")}
    apart = [tokens[0]["prompt_ids"] + ids[:-1] for ids in tokens[0]["completion_ids"]]
    assert report.token_merges == sum(a != b for a, b in zip(apart, whole.values(), strict=True)) == 1


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens", "merges"), [("the", "g", ["g"], 0), ("the lazy d", "og", ["o", "g"], 1)]
)
def test_no_space_is_put_before_a_completion(prompt, completion, tokens, merges):
    tokenizer = metaspace()
    assert tokenizer.tokenize(completion) != tokens  # the tokenizer's habit at a text's start
    rows, report = tokenize([{"prompt": prompt, "completion": completion}], tokenizer)
    assert tokenizer.convert_ids_to_tokens(rows[0]["completion_ids"][0]) == [*tokens, "</s>"]
    assert report.token_merges == merges


# Lengths


def lengths_of(tokens) -> list[int]:
    return [len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in tokens]


LONG = {"prompt": "the dog " * 20 + "sleeps", "chosen": " a", "rejected": " over the lazy dog"}
SHORT = {"prompt": "the dog", "chosen": " a", "rejected": " b"}


def test_rows_of_just_max_length_fit(tokenizer):
    (longest,) = lengths_of(tokenize([LONG], tokenizer)[0])
    tokens, report = tokenize([LONG, SHORT], tokenizer, max_length=longest)
    assert lengths_of(tokens)[0] == longest
    assert report.max_length == longest


def test_rows_too_long_are_refused_with_the_remedy(tokenizer):
    (longest,) = lengths_of(tokenize([LONG], tokenizer)[0])
    with pytest.raises(DataError) as error:
        tokenize([LONG, SHORT, LONG], tokenizer, max_length=longest - 1)
    for words in (
        f"2 of 3 rows are longer than max_length={longest - 1} tokens (the longest has {longest})",
        "raise max_length",
        'on_truncate="drop"',
        '"keep_end"',
    ):
        assert words in str(error.value)


def test_rows_too_long_are_dropped_and_counted(tokenizer):
    tokens, report = tokenize([SHORT, LONG, SHORT], tokenizer, max_length=20, on_truncate="drop")
    assert len(tokens) == report.rows_kept == 2
    assert (report.rows_in, report.dropped, report.dropped_rows) == (3, {"too long": 1}, {"too long": [2]})


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_keep_end_cuts_the_beginning_of_the_prompt_alone(name, request):
    tokenizer = request.getfixturevalue(name)
    whole = tokenize([LONG], tokenizer)[0][0]
    tokens, report = tokenize([SHORT, LONG], tokenizer, max_length=16, on_truncate="keep_end")
    row = tokens[1]
    assert lengths_of(tokens)[1] == 16
    assert row["completion_ids"] == whole["completion_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    kept = len(row["prompt_ids"]) - len(bos)
    assert row["prompt_ids"] == bos + whole["prompt_ids"][-kept:]
    assert (report.prompts_cut, report.rows_kept, report.dropped) == (1, 2, {})


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_keep_end_drops_a_row_whose_completion_leaves_the_prompt_no_room(name, request):
    tokenizer = request.getfixturevalue(name)
    completion = max(map(len, tokenize([LONG], tokenizer)[0][0]["completion_ids"]))
    least = completion + 1 + (tokenizer.bos_token_id is not None)
    kept, report = tokenize([SHORT, LONG], tokenizer, max_length=least, on_truncate="keep_end")
    assert (len(kept), report.prompts_cut) == (2, 1)
    kept, report = tokenize([SHORT, LONG], tokenizer, max_length=least - 1, on_truncate="keep_end")
    assert (len(kept), report.prompts_cut, report.dropped) == (1, 0, {"too long": 1})


def test_no_row_left_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"None of the 1 rows is left: all are longer than max_length=5"):
        tokenize([LONG], tokenizer, max_length=5, on_truncate="drop")


# Bad rows

BAD = [
    ({"prompt": "a", "chosen": " ", "rejected": " b"}, "empty completion"),
    ({"prompt": "a", "chosen": "<|im_end|>", "rejected": " b"}, "empty completion"),
    ({"prompt": "a", "chosen": " b", "rejected": " b"}, "identical pair"),
    ({"prompt": "a", "chosen": " b", "rejected": " b<|im_end|>\n"}, "identical pair"),
    ({"prompt": None, "chosen": " b", "rejected": " c"}, "missing field"),
    ({"chosen": " b", "rejected": " c"}, "missing field"),
    ({"prompt": "a", "chosen": 7, "rejected": " c"}, "wrong type"),
    ({"prompt": "a", "chosen": {"x": [None, {"y": None}]}, "rejected": " c"}, "wrong type"),
]


@pytest.mark.parametrize(("row", "kind"), BAD)
def test_a_bad_row_is_refused_by_number_or_dropped(tokenizer, row, kind):
    rows = [SHORT, row, SHORT, row]
    with pytest.raises(DataError) as error:
        tokenize(rows, tokenizer)
    assert f"2 of 4 rows cannot be used: 2 with {kind} (rows 2, 4: " in str(error.value)
    assert 'on_invalid="drop"' in str(error.value)
    tokens, report = tokenize(rows, tokenizer, on_invalid="drop")
    assert len(tokens) == report.rows_kept == 2
    assert (report.dropped, report.dropped_rows) == ({kind: 2}, {kind: [2, 4]})


CHAT_BAD = [
    ([QUESTION, assistant(" ")], "the last assistant turn holds no text"),
    ([QUESTION, assistant([])], "the last assistant turn holds no text"),
    ([QUESTION], "no assistant turn"),
    ([assistant("paris")], "put a user or system turn before it"),
    ([], "must be a non-empty list of messages"),
    ("hello", "must be a non-empty list of messages, found 'hello'"),
    ([None], "needs messages with 'role' and 'content', found None"),
    ([{"from": "human", "value": "x"}], "needs messages with 'role' and 'content', found {'from': 'human'"),
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


def test_several_kinds_are_named_in_one_error(tokenizer):
    with pytest.raises(DataError) as error:
        tokenize([SHORT, *(row for row, _ in BAD), *[BAD[2][0]] * 6], tokenizer)
    for words in ("14 of 15 rows", "2 with empty completion", "8 with identical pair (rows 4, 5, 10, 11, 12, ...: "):
        assert words in str(error.value)


def test_unknown_columns_are_named(tokenizer):
    with pytest.raises(DataError, match=r"has the columns question, answer, and one of these .*prompt/chosen/rejected"):
        tokenize([{"question": "a", "answer": "b"}], tokenizer)


def test_an_empty_dataset_is_refused(tokenizer):
    with pytest.raises(DataError, match="has no rows"):
        tokenize(datasets.Dataset.from_dict({"text": []}), tokenizer)


def test_chat_rows_need_a_chat_template():
    with pytest.raises(DataError, match=r"no chat template: set tokenizer.chat_template"):
        tokenize([PAIR], byte_level(template=None))


def test_a_tokenizer_needs_eos():
    with pytest.raises(ModelError, match=r"no EOS token.*set tokenizer.eos_token"):
        tokenize([SHORT], byte_level(eos=None))


@pytest.mark.parametrize(
    "options", [{"max_length": 0}, {"max_length": "512"}, {"on_truncate": "cut"}, {"on_invalid": "ignore"}]
)
def test_unknown_options_are_refused(tokenizer, options):
    (name, value) = next(iter(options.items()))
    with pytest.raises(ConfigError, match=rf"{name} must be .*, found {value!r}"):
        tokenize([SHORT], tokenizer, **options)


# The whole


def test_the_report_counts_what_the_tokens_hold(tokenizer):
    tokens, report = tokenize([LONG, SHORT, {**SHORT, "chosen": " the quick fox"}], tokenizer)
    prompts = [len(row["prompt_ids"]) for row in tokens]
    completions = [len(ids) for row in tokens for ids in row["completion_ids"]]
    assert report.tokens_shared == sum(prompts) + sum(completions)
    assert report.tokens_unshared == 2 * sum(prompts) + sum(completions)
    assert report.scored_tokens == sum(completions)
    assert (report.prompt_length.min, report.prompt_length.max) == (min(prompts), max(prompts))
    assert report.completion_length.mean == pytest.approx(sum(completions) / len(completions), rel=1e-15)
    assert report.completions == report.eos_added == 6


def test_a_first_token_that_nothing_predicts_is_not_counted_as_scored(tokenizer):
    tokens, report = tokenize([{"text": "the dog sleeps"}, {"text": "the fox"}], tokenizer)
    assert report.scored_tokens == sum(len(row["completion_ids"][0]) - 1 for row in tokens)


def test_batches_and_processes_do_not_change_the_result(tokenizer):
    rows = [{"prompt": f"the {n}", "completion": f" dog {n}"} for n in range(BATCH_ROWS + 10)]
    rows[BATCH_ROWS + 2]["completion"] = ""
    one, report = tokenize(rows, tokenizer, on_invalid="drop")
    two, other = tokenize(rows, tokenizer, on_invalid="drop", num_proc=2)
    alone, _ = tokenize(rows[-1:], tokenizer)
    assert report.dropped_rows == {"empty completion": [BATCH_ROWS + 3]}
    assert (one.to_list(), report) == (two.to_list(), other)
    assert one[-1] == alone[0]


def test_rows_that_were_filtered_or_formatted_are_read_as_they_stand(tokenizer):
    rows = [{"prompt": "the", "completion": text, "label": True} for text in (" dog", " fox", " cat")]
    given = datasets.Dataset.from_list(rows).select([1]).with_format("numpy")
    tokens, report = tokenize(given, tokenizer)
    assert report.rows_in == 1
    assert tokens.to_list() == tokenize(rows[1:2], tokenizer)[0].to_list()
