"""Tokenising a data set: rows that are too long, bad rows, options, and the report's counts."""

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


QUESTION = user("what is the capital?")
PAIR = {"chosen": [QUESTION, assistant("paris")], "rejected": [QUESTION, assistant("the dog")]}


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
        '"keep_start"',
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


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_keep_start_cuts_the_end_of_the_completions(name, request):
    """As TRL 1.16: the first max_length tokens of prompt and completion."""
    tokenizer = request.getfixturevalue(name)
    whole = tokenize([LONG], tokenizer)[0][0]
    prompt, completions = whole["prompt_ids"], whole["completion_ids"]
    limit = len(prompt) + min(map(len, completions)) - 1  # both completions lose something
    tokens, report = tokenize([SHORT, LONG], tokenizer, max_length=limit, on_truncate="keep_start")
    row = tokens[1]
    assert row["prompt_ids"] == prompt
    assert row["completion_ids"] == [ids[: limit - len(prompt)] for ids in completions]
    assert (report.completions_cut, report.prompts_cut, report.rows_kept) == (2, 0, 2)
    assert report.eos_present + report.eos_added == 2 and "ends each of 2 completions" in str(report)
    assert "2 of 4 completions lost their end to max_length" in str(report)


def test_keep_start_leaves_out_rows_of_which_nothing_to_learn_is_left(tokenizer):
    prompt = len(tokenize([LONG], tokenizer)[0][0]["prompt_ids"])
    for limit in (prompt, prompt - 1):
        kept, report = tokenize([SHORT, LONG], tokenizer, max_length=limit, on_truncate="keep_start")
        assert (len(kept), report.completions_cut, report.dropped) == (1, 0, {"too long": 1})
    alike = {"prompt": "a b", "chosen": " one two three four five", "rejected": " one two three four six"}
    kept, report = tokenize([SHORT, alike], tokenizer, max_length=8, on_truncate="keep_start")
    assert report.dropped == {"too long": 1}, "what is left of both is the same"


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_every_token_counts_where_it_should(name, request):
    tokenizer = request.getfixturevalue(name)
    row = {"prompt": SHORT["prompt"], "completion": SHORT["chosen"]}
    plain = tokenize([row], tokenizer)[0][0]
    tokens, report = tokenize([row], tokenizer, score_all_of=["prompt-completion"])
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    every = plain["prompt_ids"] + plain["completion_ids"][0]
    assert tokens[0] == {"prompt_ids": bos, "completion_ids": [every[len(bos) :]]}
    assert report.scored_tokens == len(every) - 1, "all but the first, which nothing predicts"
    assert tokenize([row], tokenizer, score_all_of=["messages"])[0][0] == plain


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


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_a_bad_last_row_is_named_before_any_row_is_tokenised(byte_level, kind):
    """A template and a tokenizer that fail if they are used show that neither was."""
    tokenizer = byte_level("{{ raise_exception('rendered') }}")
    tokenizer.eos_token = "<|im_end|>"
    good = {"prompt": "a", "completion": " b"}
    bad = {"prompt": "a", "completion": " "}
    if kind == "chat":
        good, bad = ({**row, "prompt": [{"role": "user", "content": "a"}]} for row in (good, bad))
        bad["completion"] = None
    used = []

    class Watched(type(tokenizer)):
        def __call__(self, *args, **kwargs):
            used.append(args)
            return super().__call__(*args, **kwargs)

    tokenizer.__class__ = Watched
    with pytest.raises(DataError, match=r"1 of 1,501 rows .*row 1501") as error:
        tokenize([good] * 1500 + [bad], tokenizer)
    assert "rendered" not in str(error.value) and not used
