"""Tokenising: EOS and BOS exactly once, the tokens of generation, lengths, bad rows, and the report's counts."""

import json

import datasets
import pytest

from fastalign.data.tokenization import BATCH_ROWS, tokenize
from fastalign.errors import ConfigError, DataError, ModelError


@pytest.fixture(scope="module")
def tokenizer(byte_level):
    return byte_level()


@pytest.fixture(scope="module")
def bos_tokenizer(byte_level):
    return byte_level(bos="<s>")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def texts(tokenizer, row) -> tuple[str, list[str]]:
    return tokenizer.decode(row["prompt_ids"]), [tokenizer.decode(ids) for ids in row["completion_ids"]]


CHAT_PROMPT = "<|im_start|>user\nwhat is the capital?<|im_end|>\n<|im_start|>assistant\n"
QUESTION = user("what is the capital?")
PAIR = {"chosen": [QUESTION, assistant("paris")], "rejected": [QUESTION, assistant("the dog")]}


# EOS, BOS and merges


@pytest.mark.parametrize("ending", ["", "<|im_end|>", "<|im_end|><|im_end|>", "<|im_end|>\n", " <|im_end|> \n"])
def test_eos_ends_each_completion_exactly_once(tokenizer, ending):
    tokens, report = tokenize([{"prompt": "a", "chosen": " paris" + ending, "rejected": " dog"}], tokenizer)
    chosen, rejected = tokens[0]["completion_ids"]
    for ids in (chosen, rejected):
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
    assert (report.eos_present, report.eos_added) == ((1, 1) if ending else (0, 2))


def test_a_template_whose_turns_do_not_end_with_eos_gets_one(byte_level):
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
def test_bos_of_a_chat_template_is_not_doubled(written, byte_level, chatml):
    tokenizer = byte_level("{{ bos_token }}" * written + chatml, bos="<s>")
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
def test_no_space_is_put_before_a_completion(prompt, completion, tokens, merges, metaspace):
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


def test_several_kinds_are_named_in_one_error(tokenizer):
    with pytest.raises(DataError) as error:
        tokenize([SHORT, *(row for row, _ in BAD), *[BAD[2][0]] * 6], tokenizer)
    for words in ("14 of 15 rows", "2 with empty completion", "8 with identical pair (rows 4, 5, 10, 11, 12, ...: "):
        assert words in str(error.value)


def test_an_empty_dataset_is_refused(tokenizer):
    with pytest.raises(DataError, match="has no rows"):
        tokenize(datasets.Dataset.from_dict({"text": []}), tokenizer)


def test_chat_rows_need_a_chat_template(byte_level):
    with pytest.raises(DataError, match=r"no chat template: set tokenizer.chat_template"):
        tokenize([PAIR], byte_level(template=None))


def test_a_tokenizer_needs_eos(byte_level):
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


def test_nothing_is_written_to_the_cache(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR))
    tokenize(path, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
