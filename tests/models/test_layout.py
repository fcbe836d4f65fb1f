"""Which layout a model gets: what the probe accepts, refuses, and leaves as it was."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers as tf
from torch import nn

from fastalign.errors import ModelError
from fastalign.models import attention
from fastalign.models.attention import NAME, PackedMask
from fastalign.models.layout import prepare_model
from fastalign.models.linear import speed_up_linear
from fastalign.models.loading import load_model

TOKENS = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LLAMA = tf.LlamaConfig(**SIZES)


def make_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from the initial state, where every token is nearly its embedding and attention nearly uniform.
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.slow
def test_a_real_model_in_sixteen_bits_shares_prompts():
    """On a CPU that cannot multiply them its stock attention rounds coarsely; over 30 layers that looks like more."""
    model = load_model("smollm2-135m-instruct", dtype="bfloat16")
    speed_up_linear(model)
    assert prepare_model(model) == "shared"


def test_the_size_of_hidden_states_does_not_change_the_verdict():
    model = make_model(tf.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4))
    with torch.no_grad():
        for parameter in model.transformer.ln_f.parameters():
            parameter.mul_(1e-6)
    assert prepare_model(model) == "padded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["scaling", "scaling of packed rows", "one segment"])
def test_attention_that_computes_something_else_is_not_used(fault, dtype, monkeypatch, caplog):
    attend = attention._packed_attention

    def wrong(query, key, value, packed, options):
        if fault == "scaling":
            options = options._replace(scaling=2 * options.scaling)
        elif fault == "one segment":
            packed = PackedMask((((0, 0), ((0, packed.length),)),), None)
        elif len(packed.segments) > 1:
            options = options._replace(scaling=1.3 * options.scaling)
        return attend(query, key, value, packed, options)

    monkeypatch.setattr(attention, "_packed_attention", wrong)
    assert prepare_model(make_model(LLAMA, dtype)) == "packed"
    assert ("with fastalign's attention differ" if fault == "scaling" else "in a packed row differ") in caplog.text


def test_adapters_and_reward_heads_are_prepared():
    model = peft.get_peft_model(make_model(LLAMA), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.train()
    layers = model.base_model.model.model.layers
    layers[0].eval()
    assert prepare_model(model) == "shared"
    assert [layer.training for layer in layers] == [False, True]
    config = tf.Qwen2Config(**SIZES, num_labels=1)
    assert prepare_model(tf.AutoModelForSequenceClassification.from_config(config)) == "shared"


def test_saved_models_do_not_name_the_attention(tmp_path):
    model = make_model(LLAMA)
    prepare_model(model)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_models_that_cannot_be_used_are_refused():
    sizes = {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        prepare_model(tf.T5ForConditionalGeneration(tf.T5Config(**sizes, vocab_size=101)))
    with pytest.raises(ModelError, match="BertModel is not causal"):
        prepare_model(make_model(tf.BertConfig(**{**SIZES, "num_key_value_heads": 4})))
    with pytest.raises(ModelError, match="got Linear"):
        prepare_model(nn.Linear(2, 2))
    prompt_tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match="PROMPT_TUNING adds virtual tokens"):
        prepare_model(peft.get_peft_model(make_model(LLAMA), prompt_tuning))
