"""EOS and BOS exactly once, and the tokens of generation, seen through `tokenize`."""

import pytest

from fastalign.data.tokenization import tokenize


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
    tokens, report = tokenize(
        [{"prompt": prompt, "chosen": " a", "rejected": " b"}], bos_tokenizer, allow_empty_prompt=True
    )
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
