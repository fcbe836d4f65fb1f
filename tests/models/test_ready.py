"""Making a loaded model ready for training."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fastalign.errors import ModelError
from fastalign.models.ready import adopt_special_tokens, check_router, check_trainable, disable_dropout


def test_nothing_to_train_is_refused(tiny_llama):
    with pytest.raises(ModelError, match="pass a peft_config, or set requires_grad"):
        check_trainable(tiny_llama().requires_grad_(False))


def test_weights_in_16_bits_are_warned_about(tiny_llama, caplog):
    with caplog.at_level(logging.WARNING, "fastalign"):
        check_trainable(tiny_llama())
    assert not caplog.records
    model = tiny_llama(dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, "fastalign"):
        check_trainable(model)
    assert "small updates round to nothing" in caplog.text
    assert model.dtype == torch.bfloat16


def test_adapter_in_16_bits_becomes_float32_and_its_base_does_not(tiny_llama):
    lora = LoraConfig(target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(dtype=torch.bfloat16), lora, autocast_adapter_dtype=False)
    check_trainable(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_special_tokens_are_the_tokenizers(tiny_llama, tokenizer):
    model = tiny_llama()
    model.config.eos_token_id = model.generation_config.eos_token_id = 77
    adopt_special_tokens(model, tokenizer)
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_stop_tokens_of_a_chat_model_stay(tiny_llama, tokenizer):
    model = tiny_llama()
    model.generation_config.eos_token_id = [77, tokenizer.eos_token_id]
    adopt_special_tokens(model, tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 77]


def test_dropout_is_turned_off_except_that_of_adapters(tiny_llama):
    lora = LoraConfig(target_modules=["q_proj"], lora_dropout=0.25)
    model = get_peft_model(tiny_llama(attention_dropout=0.5), lora)
    model.base_model.model.extra = nn.Dropout(0.5)
    disable_dropout(model)
    assert model.base_model.model.extra.p == 0.0
    assert {layer.self_attn.attention_dropout for layer in model.base_model.model.model.layers} == {0.0}
    assert {m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and "lora" in n} == {0.25}


def test_a_router_s_loss_is_refused_where_it_is_on(tiny_llama):
    model = tiny_llama()
    assert not check_router(model)
    model.config.router_aux_loss_coef = 0.01
    assert check_router(model)
    model.config.output_router_logits = True
    with pytest.raises(ModelError, match=r"output_router_logits=True.*which fastalign does not add"):
        check_router(model)
