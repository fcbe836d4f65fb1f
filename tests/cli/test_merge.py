"""`fastalign merge`: of runs that a command left, loaded by plain transformers; what it refuses."""

from __future__ import annotations

import re

import torch
import transformers as tf

from fastalign.cli.main import main
from fastalign.models.loading import load_with_adapter

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
    said = refused("merge", trained("dpo"), "--out", tmp_path / "a b", "--gguf", "model.gguf")
    assert f"convert_hf_to_gguf.py '{tmp_path}/a b' --outfile model.gguf --outtype bf16" in said
    assert not (tmp_path / "a b").exists()
    assert "nowhere" in refused("merge", tmp_path / "nowhere", "--out", tmp_path / "a")


def test_a_merged_model_that_computes_something_else_is_not_kept(trained, refused, tmp_path, monkeypatch):
    from fastalign.models import merging

    monkeypatch.setattr(merging, "merge_adapter", lambda model: model.unload())  # without adding it to the weights
    said = refused("merge", trained("dpo"), "--out", tmp_path / "a")
    assert "differs from" in said and not (tmp_path / "a").exists()
