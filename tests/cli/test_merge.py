"""`fastalign merge`: of runs that a command left, loaded by plain transformers; what it refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers as tf

from fastalign.cli.main import main
from fastalign.models.loading import load_model, load_with_adapter
from fastalign.models.scoring import prepare

IDS = torch.arange(5, 90)[None]


def logprobs(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float().log_softmax(-1)


def test_the_merged_model_is_the_run_s(trained, model_dir, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(trained("dpo")), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    plain = tf.AutoModelForCausalLM.from_pretrained(out)
    assert tf.AutoTokenizer.from_pretrained(out).chat_template
    assert not (out / "adapter_config.json").exists() and plain.dtype == torch.float32
    expected = logprobs(load_with_adapter(trained("dpo"), dtype="float32"))
    torch.testing.assert_close(logprobs(plain), expected, rtol=0, atol=1e-4)
    assert (expected - logprobs(tf.AutoModelForCausalLM.from_pretrained(model_dir))).abs().max() > 0.05
    largest = float(re.search(r"at most (\S+) nats", said)[1])
    assert 0 <= largest < 1e-4 and str(out) in said


def test_a_smaller_type_is_rounded_and_the_difference_said(trained, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(trained("dpo")), "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert tf.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert 1e-4 < float(re.search(r"at most (\S+) nats", capsys.readouterr().out)[1]) < 1


def test_a_run_of_all_weights_is_copied(trained, tmp_path, capsys):
    assert main(["merge", str(trained("sft")), "--out", str(tmp_path / "copy")]) == 0
    assert "no adapter to merge" in capsys.readouterr().out
    copied, model = (tf.AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "copy", trained("sft") / "model"))
    assert torch.equal(logprobs(copied), logprobs(model))


def test_what_is_refused(trained, refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    assert "holds something already" in refused("merge", trained("dpo"), "--out", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years"
    assert "dtype is 'int3'" in refused("merge", trained("dpo"), "--out", tmp_path / "a", "--dtype", "int3")
    assert "nowhere" in refused("merge", tmp_path / "nowhere", "--out", tmp_path / "a")


def test_a_merged_model_that_computes_something_else_is_not_kept(trained, refused, tmp_path, monkeypatch):
    from fastalign.models import merging

    monkeypatch.setattr(merging, "merge_adapter", lambda model: model.unload())  # without adding it to the weights
    said = refused("merge", trained("dpo"), "--out", tmp_path / "a")
    assert "differs from" in said and not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, model_dir, pairs, write_rows):
    """The folder of a run that trained an adapter on weights in nf4."""
    folder = tmp_path_factory.mktemp("quantised")
    rows = write_rows(folder / "rows.jsonl", pairs)
    options = [
        f"model={model_dir}", f"train={rows}", f"output_dir={folder / 'run'}", "max_steps=8", "learning_rate=3e-2",
        "use_cpu=true", "disable_tqdm=true", "lora_rank=2", "samples=0", "dtype=float32", "quantization=nf4",
        "double_quantization=true",
    ]  # fmt: skip
    assert main(["dpo", *options]) == 0
    return folder / "run"


def test_an_adapter_on_quantised_weights_is_merged_into_their_dequantised_values(quantised, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(quantised), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "trained on weights in nf4: it is merged into their dequantised values." in said
    assert float(re.search(r"at most (\S+) nats", said)[1]) < 1e-4
    plain = tf.AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(plain.config, "quantization_config")
    options = {"dtype": "float32", "quantization": "nf4", "double_quantization": True}
    trained = load_with_adapter(quantised, **options)
    prepare(trained)
    torch.testing.assert_close(logprobs(plain), logprobs(trained), rtol=0, atol=1e-4)
    unquantised = load_with_adapter(quantised, dtype="float32")
    assert (logprobs(unquantised) - logprobs(trained)).abs().max() > 0.01  # the adapter does not know those weights


def test_quantising_the_merged_weights_again_says_what_it_costs(quantised, trained, refused, tmp_path, capsys):
    out = tmp_path / "again"
    assert main(["merge", str(quantised), "--out", str(out), "--requantise"]) == 0
    said = capsys.readouterr().out
    assert "and the sum is quantised again" in said and "Model in nf4" in said
    assert float(re.search(r"at most (\S+) nats", said)[1]) > 0.01
    assert "Linear4bit" in str(load_model(out)) and not out.with_name("again.tmp").exists()
    assert "has none; leave it out" in refused("merge", trained("dpo"), "--out", tmp_path / "b", "--requantise")


def test_an_adapter_on_a_base_that_was_saved_quantised(quantised, model_dir, tmp_path, capsys):
    base = tmp_path / "base"
    load_model(model_dir, dtype="float32", quantization="nf4", double_quantization=True).save_pretrained(base)
    tf.AutoTokenizer.from_pretrained(model_dir).save_pretrained(base)
    adapter = tmp_path / "adapter"
    shutil.copytree(quantised, adapter, ignore=shutil.ignore_patterns("run.json", "checkpoint-*"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    assert float(re.search(r"at most (\S+) nats", capsys.readouterr().out)[1]) < 1e-4
    assert main(["merge", str(quantised), "--out", str(tmp_path / "other")]) == 0
    ours, theirs = (tf.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "other"))
    torch.testing.assert_close(logprobs(ours), logprobs(theirs), rtol=0, atol=1e-4)
