"""Copies of weights, and the fingerprint that names the caches."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fastalign.models.snapshot import ReferenceWeights, fingerprint

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def trained_adapter(model, seed=0) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))  # B is random, as after training


def test_the_model_computes_with_the_copy_inside_and_with_its_weights_again_after_an_error():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    reference, start = ReferenceWeights(model), model.weight.detach().clone()
    assert [p is model.weight for p in reference.parameters] == [True]
    with torch.no_grad():
        model.weight += 1.0
        with pytest.raises(RuntimeError, match="inside"), reference.in_place():
            assert torch.equal(model.weight, start)
            raise RuntimeError("inside")
        assert torch.equal(model.weight, start + 1.0)
        assert torch.equal(reference.values[0], start)
        reference.move_towards_model(0.25)
    assert torch.allclose(reference.values[0], start + 0.25)


def test_fingerprint_is_of_content(tiny_llama, model_dir):
    model = tiny_llama()
    key = fingerprint(model)
    assert fingerprint(tiny_llama()) == key
    assert fingerprint(tf.AutoModelForCausalLM.from_pretrained(model_dir)) == key
    assert fingerprint(get_peft_model(tiny_llama(), LoraConfig(**LORA))) == key  # B = 0
    others = [
        fingerprint(model, "bfloat16"),
        fingerprint(tiny_llama(dtype=torch.bfloat16)),
        fingerprint(tiny_llama(seed=1)),
        fingerprint(tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
        fingerprint(trained_adapter(tiny_llama())),
        fingerprint(trained_adapter(tiny_llama(), seed=1)),
    ]
    with torch.no_grad():
        model.model.norm.weight[0] += 2**-20
    assert len({key, fingerprint(model), *others}) == len(others) + 2


def test_fingerprint_knows_the_scale_of_an_adapter_and_whether_it_is_on(tiny_llama):
    model = trained_adapter(tiny_llama())
    key = fingerprint(model)
    with model.disable_adapter():
        off = fingerprint(model)
    for layer in model.modules():
        if isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling["default"] *= 2
    assert len({key, off, fingerprint(model)}) == 3


def test_fingerprint_sees_an_adapter_on_the_embeddings(tiny_llama):
    def key(init_lora_weights):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            lora = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=init_lora_weights)
            return fingerprint(get_peft_model(tiny_llama(tied=False), lora))

    assert key(False) != fingerprint(tiny_llama(tied=False))
