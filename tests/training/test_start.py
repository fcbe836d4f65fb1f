"""Stages chain: what an adapter has learnt is not lost when the next stage starts."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

from fastalign.errors import ConfigError, ModelError
from fastalign.models import load_model, load_with_adapter
from fastalign.models.adapters import causal_lm, has_adapter
from fastalign.training.sft import SFTTrainer

IDS = torch.arange(5, 60)[None]


def lora(**options):
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)


@torch.no_grad()
def logprobs(model):
    return model.eval()(input_ids=IDS).logits.log_softmax(-1)


@pytest.fixture
def tuned(model_dir, tmp_path, tokenizer):
    """The folder of an adapter that changes the model, and the adapted model's log-probs."""
    model = get_peft_model(load_model(model_dir, dtype="float32"), lora())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert (logprobs(model) - logprobs(load_model(model_dir, dtype="float32"))).abs().max() > 0.5
    return tmp_path / "tuned", logprobs(model)


def close(a, b):
    return (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("given", ["folder", "instance"])
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_a_new_adapter_starts_from_the_old_one_merged(make_trainer, pairs, tuned, tmp_path, given, rate):
    folder, expected = tuned
    model = str(folder) if given == "folder" else load_with_adapter(folder, dtype="float32")
    trainer = make_trainer(model, pairs, peft_config=lora(), learning_rate=rate, dtype="float32")
    assert close(logprobs(trainer.model), expected)
    report = trainer.preflight_report()
    assert "with the adapter it came with, merged" in report and "a new adapter on the base" in report
    trainer.train()  # the check of the first step compares with the reference
    trained = logprobs(trainer.model)
    assert close(trained, expected) == (rate == 0)
    trainer.save_model(str(tmp_path / "next"))
    # The new adapter names the merged model as its base, so that every library loads the same model.
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "next", dtype=torch.float32)
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "next", dtype=torch.float32)
    for again in (plain, peft, load_model(tmp_path / "next", dtype="float32")):
        assert close(logprobs(again), trained)


def test_the_model_of_a_trainer_can_go_into_the_next_one(make_trainer, tiny_llama, pairs):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    first = make_trainer(tiny_llama(), rows, SFTTrainer, peft_config=lora(), max_steps=3, learning_rate=0.5)
    first.train()
    expected = logprobs(first.model)
    assert not close(expected, logprobs(tiny_llama()))
    second = make_trainer(first.model, pairs, peft_config=lora())
    assert close(logprobs(second.model), expected)
    second.train()
    assert not close(logprobs(second.model), expected)


@pytest.mark.parametrize("given", ["folder", "instance"])
def test_without_a_new_adapter_the_old_one_goes_on(make_trainer, pairs, tuned, given):
    folder, expected = tuned
    model = str(folder) if given == "folder" else load_with_adapter(folder, dtype="float32")
    trainer = make_trainer(model, pairs, learning_rate=0.05, dtype="float32", precompute_ref_log_probs=False)
    assert isinstance(trainer.model, PeftModel) and close(logprobs(trainer.model), expected)
    assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    report = trainer.preflight_report()
    assert "the model with the adapter as it came" in report and "the adapter it came with, further" in report
    trainer.train()
    assert not close(logprobs(trainer.model), expected)
    with trainer.reference.weights.in_place():
        assert close(logprobs(trainer.model), expected)


def test_merging_without_a_new_adapter_trains_all_weights(make_trainer, pairs, tuned):
    folder, expected = tuned
    trainer = make_trainer(str(folder), pairs, adapter="merge")
    assert not has_adapter(trainer.model) and close(logprobs(trainer.model), expected)
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_an_adapter_with_dropout_goes_on(make_trainer, model_dir, pairs, tuned, tmp_path):
    folder, _ = tuned
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_dropout": 0.0', '"lora_dropout": 0.5'))
    make_trainer(str(folder), pairs, precompute_ref_log_probs=False).train()
    assert '"lora_dropout": 0.5' in config.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": "stack"}, "adapter is 'stack', which is not supported"),
        ({"adapter": "join"}, "adapter"),
        ({"adapter": "continue", "peft_config": lora()}, "leave peft_config out"),
    ],
)
def test_contradictions_are_refused(make_trainer, pairs, tuned, options, said):
    with pytest.raises(ConfigError, match=said):
        make_trainer(str(tuned[0]), pairs, **options)


def test_what_is_not_there_is_said(make_trainer, tiny_llama, pairs, tuned):
    with pytest.raises(ModelError, match="comes without an adapter"):
        make_trainer(tiny_llama(), pairs, adapter="merge")
    with pytest.raises(ModelError, match="is not the folder of an adapter"):
        load_with_adapter("nowhere")
    folder = tuned[0]
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "./gone"}')
    with pytest.raises(
        ModelError, match=r"The base model of the adapter .* cannot be loaded: There is no model folder"
    ):
        load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base_model_name_or_path"):
        load_model(folder)


def test_a_base_that_moved_with_its_run_is_found(make_trainer, pairs, tuned, tmp_path):
    trainer = make_trainer(str(tuned[0]), pairs, peft_config=lora(), dtype="float32")
    expected = logprobs(trainer.model)
    trainer.save_model()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert close(logprobs(load_model(tmp_path / "elsewhere", dtype="float32")), expected)
    assert causal_lm(load_with_adapter(tmp_path / "elsewhere")).name_or_path == str(tmp_path / "elsewhere" / "base")
