"""The train suite: its rows have the lengths they should, and loss curves that differ stop it."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys

import pytest
import torch

from bench import __main__ as bench
from bench.harness import machine, rounding
from bench.harness.measure import ROOT, Missing
from bench.suites import train

LIKE_OURS = [0.693, 0.65, 0.6]


@pytest.fixture(scope="module")
def words():
    """A tokenizer that knows some words with a space before them, and others that are no such words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["?", "Ġred", "Ġblue", "Ġa", "green", "Ġa1", "Ġ12", "Ġ-", "ĠÃª"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


@pytest.mark.parametrize("profile", train.PROFILES)
@pytest.mark.parametrize("part", [0, 1])
def test_lengths_have_the_mean_and_the_bounds_of_their_profile(profile, part):
    least, mean, most = train.PROFILES[profile][part]
    for count in (20, 40, 200):
        drawn = train.lengths(random.Random(0), count, least, mean, most)
        assert statistics.mean(drawn) == pytest.approx(mean, abs=0.5)  # of whole numbers
        assert least <= min(drawn) and max(drawn) <= most
        assert max(drawn) > 1.7 * mean and min(drawn) < mean / 1.7, "they vary"
        assert drawn != sorted(drawn) and sorted(drawn) == sorted(
            train.lengths(random.Random(1), count, least, mean, most)
        )


@pytest.mark.parametrize("profile", train.PROFILES)
def test_rows_have_as_many_tokens_as_were_drawn(profile, words):
    rows = train.rows(profile, words, 20)
    assert rows == train.rows(profile, words, 20)
    draw = random.Random(profile)
    prompts = train.lengths(draw, 20, *train.PROFILES[profile][0])
    completions = train.lengths(draw, 40, *train.PROFILES[profile][1])
    assert counts(rows, words, "prompt") == prompts
    assert counts(rows, words, "chosen") == completions[::2] and counts(rows, words, "rejected") == completions[1::2]
    assert {w for row in rows for w in row["prompt"].split()} == {"red", "blue", "a"}, "each is one token"
    # a completion ends with a token that is not in the text
    assert train._useful_tokens(rows, words) == (sum(prompts + completions) + 40, sum(completions) + 40)


def counts(rows, tokenizer, side):
    return [len(tokenizer(row[side])["input_ids"]) for row in rows]


@pytest.mark.slow
def test_words_of_the_real_tokenizer_are_one_token_each():
    from fastalign.models.loading import load_tokenizer

    tokenizer = load_tokenizer(train.MODEL)
    for row in train.rows("dialogue", tokenizer, 20):
        for text in row.values():
            assert len(tokenizer(text)["input_ids"]) == len(text.split())


CASE = "lora-float32-dialogue"


def finished(losses, seconds=1.0, gradient=(3.0, 4.0)):
    steps = [9 * seconds, *[seconds] * (len(losses) - 1)]  # the first one warms up
    return train.Run(steps, losses, 0.6, 300, 90, 10**6, 3 << 30, 1 << 30, list(gradient))


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """A function that runs the suite's quick case into a folder; processes end at once with what is given."""
    monkeypatch.setattr(machine, "SIZE", 80)

    def run(results, case=CASE):
        def in_fresh_process(case, name):
            if isinstance(results.get(name), train.Run):
                return results[name]
            raise Missing("it is not here")

        monkeypatch.setattr(train, "in_fresh_process", in_fresh_process)
        arguments = ["train", "--case", case, "--out", str(tmp_path)]
        bench.run_suite("train", bench.parser().parse_args(arguments))
        return bench.load(tmp_path / "train.json")

    return run


def test_a_record_of_each_trainer(suite):
    steps = train.CASES[CASE].steps
    records = suite({"fastalign": finished(LIKE_OURS), "TRL": finished([0.69301, *LIKE_OURS[1:]], 4.0)})
    ours, theirs = records
    assert (ours.implementation, theirs.implementation) == ("fastalign", "TRL")
    assert ours.median_s == pytest.approx(1.0 + 0.6 / steps), "a step, and its share of the reference"
    assert theirs.median_s == pytest.approx(4.0 + 0.6 / steps)
    assert ours.errors["loss"] == theirs.errors["loss"] == pytest.approx(1e-5)
    assert ours.sizes["tokens"] == 300 // steps and ours.sizes["resident_bytes"] == 3 << 30
    assert ours.peak_extra_bytes == 1 << 30
    assert (ours.losses, theirs.losses) == (LIKE_OURS, [0.69301, *LIKE_OURS[1:]]), "read back from the file"
    assert ours.skipped == theirs.skipped == {"TRL, no checkpointing": "it is not here"}


@pytest.mark.parametrize("wrong", [[0.693, 0.65, 0.6002], [0.693, 0.65, float("nan")]])
def test_loss_curves_that_differ_stop_it_and_nothing_is_written(wrong, suite, tmp_path):
    with pytest.raises(SystemExit, match="its loss differs"):
        suite({"fastalign": finished(LIKE_OURS), "TRL": finished(wrong)})
    assert list(tmp_path.iterdir()) == []


def test_one_trainer_alone_is_no_comparison(suite, tmp_path):
    with pytest.raises(SystemExit, match="nothing to compare"):
        suite({"fastalign": finished(LIKE_OURS)})
    assert list(tmp_path.iterdir()) == []


def test_two_settings_of_trl_alone_are_no_comparison(suite):
    """A fault of ours must not pass because the two agree."""
    with pytest.raises(SystemExit, match="nothing to compare"):
        suite({"TRL": finished(LIKE_OURS), "TRL, no checkpointing": finished(LIKE_OURS)})


TWINS = {rounding.FLOAT32: finished([0.6931, 0.70]), rounding.PEFT: finished([0.6931, 0.85], gradient=(3.0, 4.3))}
for twin, last, along in zip(rounding.LAST_BITS, (0.72, 0.65, 0.69), (4.0, 4.1, 4.05), strict=True):
    TWINS[twin] = finished([0.6931, last], gradient=(3.0, along))


@pytest.mark.parametrize("name", ["fastalign", "TRL"])
def test_bfloat16_is_held_to_what_rounding_explains(name, suite, monkeypatch):
    """Three times what other last bits change: 0.05 and 0.02; a peer's losses and gradient, what peft's layers do."""
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda: True)
    case = "lora-bfloat16-dialogue"
    loss, gradient = (0.14, 0.05) if name == "fastalign" else (0.44, 0.17)
    slope = 0.8 * gradient  # of (3, 4 + 5 g) along (3, 4)

    def run(loss, gradient):
        right = {"fastalign": finished([0.6931, 0.70]), "TRL": finished([0.6931, 0.70])}
        return suite(TWINS | right | {name: finished([0.6931, 0.70 + loss], gradient=(3.0, 4.0 + 5 * gradient))}, case)

    (record,) = (r for r in run(loss, gradient) if r.implementation == name)
    assert record.errors == pytest.approx({"loss": loss, "gradient": gradient, "slope": slope})
    with pytest.raises(SystemExit, match=f"{name} on {case}: its loss differs"):
        run(loss + 0.02, 0)
    with pytest.raises(SystemExit, match=f"{name} on {case}: its gradient differs"):
        run(0, gradient + 0.02)
    for nan in ((math.nan, 0), (0, math.nan)):
        with pytest.raises(SystemExit, match="differs by nan"):
            run(*nan)


@pytest.mark.parametrize("factor", [0, 0.7, 1.3])
def test_what_all_our_runs_have_in_common_is_not_explained_by_them(factor, suite, monkeypatch):
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda: True)
    ours = ("fastalign", *rounding.LAST_BITS, rounding.PEFT)
    faulty = {name: finished([0.6931, 0.70], gradient=(3.0 * factor, 4.0 * factor)) for name in ours}
    with pytest.raises(SystemExit, match="fastalign on lora-bfloat16-dialogue: its slope differs"):
        suite(TWINS | faulty | {"TRL": finished([0.6931, 0.70])}, "lora-bfloat16-dialogue")


def test_what_other_trainers_lose_of_a_gradient_is_explained(suite, monkeypatch):
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda: True)

    def run(ours, theirs):
        of = {
            name: finished([0.6931, 0.70], gradient=(3 * f, 4 * f))
            for name, f in (("fastalign", ours), ("TRL", theirs))
        }
        twins = dict.fromkeys((*rounding.LAST_BITS, rounding.PEFT), of["fastalign"])
        return suite(TWINS | twins | of, "lora-bfloat16-dialogue")

    assert len(run(0.4, 0.3)) == 2
    with pytest.raises(SystemExit, match="fastalign on lora-bfloat16-dialogue: its slope differs"):
        run(0.4, 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_later_rounds_are_checked_too(dtype):
    right, wrong = finished([0.6931, 0.70]), finished([0.6931, 1.90])
    twins = TWINS if dtype == "bfloat16" else {}
    for name in ("fastalign", "TRL"):
        runs = {"fastalign": [right], "TRL": [right]} | {name: [right, wrong]}
        with pytest.raises(SystemExit, match="its loss differs"):
            train._check(train.CASES[f"lora-{dtype}-dialogue"], name, runs, twins)


def test_no_twin_no_record(suite, monkeypatch):
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda: True)
    some = {n: r for n, r in TWINS.items() if n != rounding.LAST_BITS[1]}
    with pytest.raises(SystemExit, match="last bits 2: it is not here"):
        suite(some | {"fastalign": finished([0.6931, 0.7]), "TRL": finished([0.6931, 0.7])}, "lora-bfloat16-dialogue")


def test_the_sketch_keeps_lengths_and_distances(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(rounding, "BLOCK", 5000)  # several, and none of them whole
    sketches, grads = [], []
    for _ in range(2):
        model = torch.nn.Linear(301, 199)
        model.bias.requires_grad_(False)
        model.weight.grad = torch.randn(199, 301)
        grads.append(model.weight.grad)
        sketches.append(torch.tensor(rounding.sketch(model)))
        assert rounding.sketch(model) == sketches[-1].tolist(), "the signs are the same each time"
    assert sketches[0].norm().item() == pytest.approx(grads[0].norm().item(), rel=0.1)
    assert (sketches[0] - sketches[1]).norm().item() == pytest.approx((grads[0] - grads[1]).norm().item(), rel=0.1)


def test_training_is_held_to_the_fastest_product_of_its_dtype(record, monkeypatch):
    products = [record(sizes={"flop": 600}, median_s=seconds) for seconds in (3.0, 2.0, 6.0)]
    measured = []
    monkeypatch.setattr(machine, "run", lambda case, *_: measured.append(case) or products)
    assert train._gemm_rate("lora-float32-dialogue", 20) == 300
    assert measured == ["product-float32"]


def test_twins_are_those_that_the_case_and_the_machine_have():
    assert rounding.twins("lora", True) == [rounding.FLOAT32, *rounding.LAST_BITS, rounding.PEFT]
    assert rounding.PEFT not in rounding.twins("full", True) + rounding.twins("lora", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_last_bits(dtype):
    """Each weight is off by a bfloat16 number's last place at most; most are; each twin's are its own."""
    models = [torch.nn.Linear(50, 40).to(dtype) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for twin, model in zip(rounding.LAST_BITS, models[1:], strict=False):
        rounding.change(model, twin, False)
        off = (model.weight - models[0].weight).abs() / models[0].weight.abs()
        assert off.max() <= 2 * torch.finfo(torch.bfloat16).eps and (off > 0).float().mean() > 0.4
    assert not torch.equal(models[1].weight, models[2].weight)
    before = models[0].weight.clone()
    for name in ("fastalign", "TRL", rounding.FLOAT32):
        rounding.change(models[0], name, False)
        assert torch.equal(models[0].weight, before)


def test_last_bits_drawn_for_every_run():
    """The same ones for all runs that are no twin, and none of a twin's."""
    names = ("fastalign", "TRL", rounding.FLOAT32, *rounding.LAST_BITS)
    start, models = torch.nn.Linear(50, 40).state_dict(), {name: torch.nn.Linear(50, 40) for name in names}
    for name, model in models.items():
        model.load_state_dict(start)
        rounding.change(model, name, True)
    ours, *others = models.values()
    assert not torch.equal(ours.weight, start["weight"])
    same = [torch.equal(ours.weight, other.weight) for other in others]
    assert same == [True, True, False, False, False]


def test_peft_s_own_layers(monkeypatch):
    from fastalign.models import scoring

    monkeypatch.setattr(scoring, "speed_up_linear", scoring.speed_up_linear)
    layer = torch.nn.Linear(3, 3).half()
    rounding.change(layer, rounding.PEFT, False)
    scoring.speed_up_linear(layer)
    assert "forward" not in vars(layer)


def test_the_clock_takes_each_step_of_a_trainer(make_trainer, tiny_llama, pairs):
    seconds = []
    make_trainer(tiny_llama(), pairs, max_steps=2, callbacks=[train._clock(seconds)]).train()
    assert len(seconds) == 2 and all(s > 0 for s in seconds)


def test_what_weighs_an_op_is_loaded_without_transformers():
    """It takes seconds, in each of the processes that memory is measured in."""
    code = "import sys, bench.__main__; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
