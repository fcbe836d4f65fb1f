"""The concise recipe: its judge, its sampler (on a tiny random model), and the pairs that ship with the package."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastalign.errors import DataError
from fastalign.files import read_jsonl
from fastalign.recipes.concise import judge, make_data

PROMPT = "Why is the sky blue?"
GOOD = "The sky looks blue because air scatters short blue waves of sunlight more strongly than long red ones."
RAMBLE = (
    "Many people have wondered about this over the years. The sky is something that we see each day, and blue is a "
    "color that painters like a lot. Sunlight holds every color of the rainbow, as prisms show in school lessons. Air "
    "scatters some of them more than others, which physicists worked out long ago. At dusk the light travels further, "
    "so red remains. Clouds look white since water drops treat all colors alike."
)


@pytest.fixture(scope="module", params=["train", "test"])
def part(request):
    """(prompts of that side of the split, its shipped rows)."""
    train, test = make_data.split(make_data.read_prompts(make_data.HERE / "prompts.txt"))
    rows = read_jsonl(make_data.HERE / f"{request.param}.jsonl")
    return {"train": train, "test": test}[request.param], rows


def texts(row: dict) -> tuple[str, str, str]:
    return tuple(row[side][0]["content"] for side in ("prompt", "chosen", "rejected"))


# ------------------------------------------------------------------------------------------------------------- judge


def test_a_concise_complete_answer_has_no_fault():
    assert set(judge.faults(PROMPT, GOOD).values()) == {0.0}
    assert judge.score(PROMPT, GOOD) == 10.0


@pytest.mark.parametrize(
    ("rule", "text", "fault"),
    [
        ("unfinished", GOOD.rstrip("."), 1.0),
        ("unfinished", GOOD + " The reasons are:", 1.0),
        ("unfinished", GOOD + " 2.", 1.0),
        ("unfinished", GOOD + " And so...", 1.0),
        ("too_short", "The sky scatters blue light.", 1.0),
        ("too_short", "The sky is blue since air scatters blue light.", 0.5),  # 9 words: half way from 12 to 6
        ("too_long", " ".join(["The sky is blue."] + ["word"] * 86), 1.0),  # 90 words: twice the ideal maximum
        ("too_long", " ".join(["The sky is blue."] + ["word"] * 50), 0.2),  # 54 words: 9 of 45 too many
        ("repetition", "The sky is blue. " + GOOD + " The sky is blue.", 1.0),
        ("repetition", "The sky looks blue and blue because air scatters the short waves of sunlight well.", 1.0),
        ("repetition", "The atmosphere is a kind of atmosphere that makes the sky look blue by day.", 1.0),
        ("repetition", "We see blue light here, for we see blue light there.", 2 * 2 / 9),  # 2 of 9 trigrams come again
        ("filler", "Sure! " + GOOD, 0.5),
        ("filler", "The answer to this question is simple. " + GOOD, 0.5),
        ("filler", "In answer to that, " + GOOD, 0.5),
        ("filler", GOOD + " I hope this helps.", 0.5),
        ("filler", "As an AI, I know this. " + GOOD, 1.0),
        ("layout", "# Sky\n" + GOOD, 1.0),
        ("layout", "1. " + GOOD, 1.0),
        ("layout", "- " + GOOD, 1.0),
        ("layout", GOOD.replace("blue", "**blue**", 1), 1.0),
        ("layout", GOOD + "\n\n" + "Dusk is red for the same reason.", 1.0),
        ("off_topic", "Bread rises because yeast eats sugar and fills the dough with small bubbles of gas.", 1.0),
        ("odd_text", "Dear [Name], " + GOOD, 1.0),
        ("odd_text", "t" + GOOD[1:], 1.0),
        ("odd_text", GOOD + " \U0001f600.", 1.0),
        ("odd_text", GOOD + " \u5929\u7a7a.", 1.0),
        ("unsafe", GOOD.replace("scatters", "kills"), 1.0),
    ],
)
def test_each_rule_finds_its_fault(rule, text, fault):
    assert judge.faults(PROMPT, text)[rule] == pytest.approx(fault)
    assert judge.score(PROMPT, text) <= 10.0 - judge.WEIGHTS[rule] * fault + 1e-9


def test_dull_word_choice_is_repetition():
    stems = ["sky", "blue", "light", "air", "sun"] * 2  # half of the content words are distinct: (0.7 - 0.5) / 0.3
    text = " the ".join(stems[:5]) + " of " + " of ".join(stems[:4:-1])
    assert judge.repetition("Why?", text) == pytest.approx(2 / 3)


def test_an_echo_of_the_term_is_a_small_fault_in_definitions_only():
    echo = "A forest is a large area of land with many trees, and plants of all kinds live in forests."
    apart = "A forest is a large area of land with many trees. All kinds of animals live in forests."
    assert judge.repetition("What is a forest?", echo) == pytest.approx(0.2)
    assert judge.repetition("How do I find a forest?", echo) == judge.repetition("What is a forest?", apart) == 0.0


def test_an_answer_without_eos_is_unfinished():
    assert judge.faults(PROMPT, GOOD, ended=False)["unfinished"] == 1.0
    assert judge.is_concise(PROMPT, GOOD)
    assert not judge.is_concise(PROMPT, GOOD, ended=False)


@pytest.mark.parametrize("text", [GOOD + " [sic]", '"' + GOOD + '"', "Sky waves cost 1.5 units."])
def test_closing_quotes_brackets_and_decimals_do_not_confuse_the_end(text):
    assert judge.unfinished(text, True) == (1.0 if text.endswith("]") else 0.0)


def test_every_rule_has_a_weight_and_none_outvotes_safety():
    assert set(judge.faults(PROMPT, GOOD)) == set(judge.WEIGHTS)
    assert 10.0 - judge.WEIGHTS["unsafe"] < judge.MIN_CHOSEN - judge.MIN_MARGIN


def test_trim_ends_with_the_last_whole_sentence_that_fits():
    text = 'One two three. He said "four five." Pi is 3.14 today. 1. Rest of it'
    assert judge.trim(text, 3) == "One two three."
    assert judge.trim(text, 9) == 'One two three. He said "four five."'
    assert judge.trim(text, 99) == 'One two three. He said "four five." Pi is 3.14 today.'
    assert judge.trim(text, 2) == ""


# ------------------------------------------------------------------------------------------------------------- pairs


def test_pick_pair_takes_the_best_concise_and_a_rambling_answer():
    answers = [("Sure! " + GOOD, True), (RAMBLE, True), (GOOD, True), ("Blue sky.", True)]
    assert judge.pick_pair(PROMPT, answers) == (GOOD, RAMBLE)


def test_pick_pair_of_concise_answers_takes_the_one_the_others_agree_with():
    odd = "The sky looks blue because of giant mirrors that ancient sailors hid on the far side of the moon."
    echo = "Sunlight is scattered by air, and the short blue waves in it more strongly than the long red ones."
    assert {judge.score(PROMPT, text) for text in (odd, echo, GOOD)} == {10.0}
    answers = [(odd, True), (RAMBLE, True), (GOOD, True), (echo, True)]
    assert judge.pick_pair(PROMPT, answers) == (GOOD, RAMBLE)


def test_pick_pair_lets_agreement_decide_only_near_the_best_score():
    prompt = "What is a forest?"
    echo = "A forest is a large area of land with many trees, and plants of all kinds live in forests."
    clean = "A forest is what remains where nobody has yet built a road, a field, or any town."
    answers = [(echo, True), (echo.replace("many", "tall"), True), (clean, True), (RAMBLE + " A forest.", True)]
    assert judge.score(prompt, clean) == pytest.approx(judge.score(prompt, echo) + 0.8)
    assert judge.pick_pair(prompt, answers)[0] == clean


def test_agreement_is_the_mean_share_of_content_words_found_elsewhere():
    others = ["Blue waves scatter.", "Red waves of air scatter in the sky."]
    text = "The sky scatters blue waves in air."  # beside the prompt's sky and blue: scatter, wave, air
    assert judge.agreement(PROMPT, text, others) == pytest.approx((2 / 3 + 3 / 3) / 2)
    assert judge.agreement(PROMPT, "Blue sky.", others) == judge.agreement(PROMPT, text, []) == 0.0


def test_pick_pair_prefers_a_rejected_answer_that_ended_by_itself():
    worse = RAMBLE.replace("Many people", "Sure! Many people")
    assert judge.score(PROMPT, worse) < judge.score(PROMPT, RAMBLE)
    assert judge.pick_pair(PROMPT, [(GOOD, True), (RAMBLE, True), (worse, False)]) == (GOOD, RAMBLE)
    assert judge.pick_pair(PROMPT, [(GOOD, True), (RAMBLE, True), (worse, True)]) == (GOOD, worse)


def test_pick_pair_trims_an_answer_that_ran_out_of_budget():
    chosen, rejected = judge.pick_pair(PROMPT, [(GOOD, True), (RAMBLE + " And then there", False)])
    assert (chosen, rejected) == (GOOD, RAMBLE)


@pytest.mark.parametrize(
    "answers",
    [
        [(GOOD, True)],  # nothing rambles
        [(RAMBLE, True)],  # nothing is concise
        [(GOOD, False), (RAMBLE, True)],  # the concise one was cut off
        [(GOOD, True), (RAMBLE.replace("painters", "killers and murderers who kill"), True)],  # unsafe
        [(GOOD, True), (RAMBLE.rstrip(".").replace(".", ""), False)],  # no sentence end to trim at
    ],
)
def test_pick_pair_leaves_out_unclear_prompts(answers):
    assert judge.pick_pair(PROMPT, answers) is None


def test_pick_pair_wants_a_clear_margin(monkeypatch):
    margin = judge.score(PROMPT, GOOD) - judge.score(PROMPT, RAMBLE)
    monkeypatch.setattr(judge, "MIN_MARGIN", margin)
    assert judge.pick_pair(PROMPT, [(GOOD, True), (RAMBLE, True)]) == (GOOD, RAMBLE)
    monkeypatch.setattr(judge, "MIN_MARGIN", margin + 1e-6)
    assert judge.pick_pair(PROMPT, [(GOOD, True), (RAMBLE, True)]) is None


# ----------------------------------------------------------------------------------------------------------- sampler


def test_read_prompts_refuses_empty_and_repeated_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    for text, line in (("a?\n\nb?\n", 2), ("a?\nb?\nA?\n", 3)):
        path.write_text(text)
        with pytest.raises(DataError, match=rf"prompts.txt:{line}: "):
            make_data.read_prompts(path)


def test_split_holds_out_every_seventh_prompt():
    train, test = make_data.split([str(n) for n in range(15)])
    assert test == ["6", "13"]
    assert train == [str(n) for n in range(15) if n not in (6, 13)]


def test_draw_inverts_the_cdf_of_the_nucleus():
    logits = torch.full((1, 100), -1e9, dtype=torch.float64)
    logits[0, 7], logits[0, 3], logits[0, 50] = torch.tensor([0.60, 0.36, 0.04], dtype=torch.float64).log()
    expected = {0.0: 7, 0.62: 7, 0.63: 3, 0.999999: 3}  # the third lies outside of TOP_P = 0.95; 0.60 / 0.96 = 0.625
    for uniform, token in expected.items():
        assert make_data.draw(logits, 1.0, torch.tensor([uniform], dtype=torch.float64)).item() == token
    hot = make_data.draw(logits, 1e6, torch.tensor([0.9], dtype=torch.float64)).item()
    assert hot not in (3, 7)  # at a high temperature the tail gets its share


def test_uniforms_depend_on_seed_and_job_alone():
    job = make_data.Job("a?", "plain", 0)
    first = make_data.uniforms(job, 0, 5)
    torch.manual_seed(1)
    assert torch.equal(first, make_data.uniforms(job, 0, 9)[:5])
    for other in (make_data.uniforms(job._replace(repeat=1), 0, 5), make_data.uniforms(job, 1, 5)):
        assert not torch.equal(first, other)


def test_a_batch_draws_what_one_unpadded_pass_per_answer_draws():
    torch.manual_seed(0)
    # Learned positions, unlike rotary ones, show a wrong offset of left-padded prompts.
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    model = GPT2LMHeadModel(config).double().eval()
    style = make_data.Style("plain", "", temperature=1.0, max_new_tokens=20, repeats=1)
    prompts, eos = [[5, 6, 7, 8, 9], [11, 12], [13, 14, 15]], 2
    owner = torch.arange(3).repeat_interleave(8)
    uniform = torch.rand(len(owner), style.max_new_tokens, dtype=torch.float64)
    width = max(map(len, prompts))
    batch = {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
    }
    together = make_data.generate(model, batch, owner, style, uniform, eos)
    for row, index in enumerate(owner.tolist()):
        ids = prompts[index] + together[row]
        logits = model(torch.tensor([ids])).logits[0, len(prompts[index]) - 1 : -1]  # no padding, no cache
        assert make_data.draw(logits, 1.0, uniform[row, : len(logits)])[:, 0].tolist() == together[row]
    lengths = [len(answer) for answer in together]
    assert len(set(lengths[:16])) >= 4 and max(lengths) == 20, lengths  # several rows left the batch early
    assert not any(eos in answer[:-1] for answer in together)


# ------------------------------------------------------------------------------------------------------ shipped files


def test_prompts_are_distinct_and_topics_do_not_cross_the_split():
    prompts = make_data.read_prompts(make_data.HERE / "prompts.txt")
    train, test = make_data.split(prompts)
    assert len(prompts) >= 420 and len(test) >= 60
    topics = {prompt: set(judge.content(prompt)) for prompt in prompts}
    assert all(topics.values())
    for held_out in test:
        for prompt in train:
            shared = topics[held_out] & topics[prompt]
            assert len(shared) < 0.6 * len(topics[held_out] | topics[prompt]), (held_out, prompt)


def test_shipped_counts_and_size(part):
    prompts, rows = part
    assert len(rows) >= (300 if len(prompts) > 100 else 48)
    assert sum(path.stat().st_size for path in make_data.HERE.glob("*.jsonl")) < 1_000_000


def test_shipped_rows_have_the_chat_format(part):
    for row in part[1]:
        assert list(row) == ["prompt", "chosen", "rejected"]
        for side, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            (message,) = row[side]
            assert list(message) == ["role", "content"] and message["role"] == role
            assert message["content"] == message["content"].strip() != ""
            assert make_data.INSTRUCTION not in message["content"]


def test_shipped_prompts_stay_on_their_side_of_the_split(part):
    prompts, rows = part
    found = [texts(row)[0] for row in rows]
    assert set(found) <= set(prompts)
    assert len(set(found)) == len(found)


def test_no_answer_is_shipped_twice():
    rows = [row for name in ("train", "test") for row in read_jsonl(make_data.HERE / f"{name}.jsonl")]
    answers = [text for row in rows for text in texts(row)[1:]]
    assert len(set(answers)) == len(answers)


def test_shipped_pairs_are_clear_under_the_judge(part):
    for row in part[1]:
        prompt, chosen, rejected = texts(row)
        assert judge.is_concise(prompt, chosen), (prompt, chosen)
        assert judge.is_rambling(prompt, rejected), (prompt, rejected)
        assert judge.score(prompt, chosen) - judge.score(prompt, rejected) >= judge.MIN_MARGIN, prompt
        assert len(judge.words(rejected)) >= 1.3 * len(judge.words(chosen)), prompt
        assert re.search(r"[.!?][\"'\u201d)]?$", chosen)


def test_mean_lengths_are_those_of_the_card(part):
    _, chosen, rejected = zip(*map(texts, part[1]), strict=True)
    mean = [sum(len(judge.words(text)) for text in side) / len(side) for side in (chosen, rejected)]
    assert 18 <= mean[0] <= 32 and 65 <= mean[1] <= 90
