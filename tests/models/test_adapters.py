"""What fastalign reads of peft's models and layers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from fastalign.errors import ModelError
from fastalign.models.adapters import (
    add_adapter,
    causal_lm,
    check_packable,
    fusible_lora,
    has_adapter,
    is_disabled,
    lora_config,
    lora_layers,
    plain_name,
    unwrap_layer,
)  # fmt: skip


def adapted(model, **options):
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **options))


def test_the_model_is_found_in_its_wrappers(tiny_llama):
    model = tiny_llama()
    wrapped = torch.nn.Module()
    wrapped.module = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert causal_lm(wrapped) is model
    assert causal_lm(model) is model


def test_configuration_of_the_adapter():
    config = lora_config(rank=4, alpha=12, dropout=0.1, targets="q_proj, v_proj")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.1)
    assert config.target_modules == {"q_proj", "v_proj"} and config.task_type == "CAUSAL_LM"
    assert lora_config(rank=4, alpha=8).target_modules == "all-linear"


def test_a_new_adapter_depends_on_its_seed_alone(tiny_llama):
    def first_factor(seed):
        model = add_adapter(tiny_llama(), lora_config(rank=2, alpha=4, targets="q_proj"), seed)
        assert has_adapter(model) and not has_adapter(tiny_llama())
        return next(lora_layers(model))[1].a

    assert torch.equal(first_factor(3), first_factor(3))
    assert not torch.equal(first_factor(3), first_factor(4))


def test_an_adapter_that_does_not_fit_is_one_sentence(tiny_llama):
    with pytest.raises(ModelError, match=r"^The adapter does not fit LlamaForCausalLM: .*nowhere") as raised:
        add_adapter(tiny_llama(), lora_config(rank=2, alpha=4, targets="nowhere"), 0)
    assert "\n" not in str(raised.value)


def test_plain_names_are_those_of_the_model_without_adapters(tiny_llama):
    plain = dict(tiny_llama().named_parameters())
    model = adapted(tiny_llama(), target_modules=["q_proj"])
    assert {plain_name(name) for name, _ in model.named_parameters() if "lora_" not in name} == plain.keys()
    layers = dict(lora_layers(model))
    assert list(layers) == [name for name in plain if "q_proj" in name]
    assert all(lora.b.shape[0] == plain[name].shape[0] and lora.scaling == 2.0 for name, lora in layers.items())


def test_the_layer_inside_and_the_adapters_that_count(tiny_llama):
    model = adapted(tiny_llama(tied=False), target_modules=["lm_head"])
    head = causal_lm(model).lm_head
    inner, (lora,) = unwrap_layer(head)
    assert inner is head.base_layer is lora.base
    torch.testing.assert_close(lora.b @ lora.a * lora.scaling, head.get_delta_weight("default"))
    assert not is_disabled(head)
    with model.disable_adapter():
        assert is_disabled(head) and unwrap_layer(head) == (inner, [])
    model.merge_adapter()
    assert unwrap_layer(head) == (inner, [])
    assert unwrap_layer(inner) == (inner, [])


def test_a_layer_that_is_trained_as_a_whole_is_the_active_copy(tiny_llama):
    model = adapted(tiny_llama(tied=False), target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = causal_lm(model).lm_head
    assert unwrap_layer(head) == (head.modules_to_save["default"], [])
    with model.disable_adapter():
        assert unwrap_layer(head) == (head.original_module, [])


@pytest.mark.parametrize(
    ("options", "fusible"),
    [({}, True), ({"lora_dropout": 0.1}, False), ({"lora_bias": True}, False), ({"use_dora": True}, False)],
)
def test_what_can_be_added_inside_the_layer_s_product(tiny_llama, options, fusible):
    model = adapted(tiny_llama(), target_modules=["q_proj"], **options).train()
    layer = causal_lm(model).model.layers[0].self_attn.q_proj
    assert (fusible_lora(layer) is not None) == fusible
    if "lora_dropout" in options:  # it drops nothing in evaluation mode
        assert fusible_lora(layer.eval()) is not None
    with model.disable_adapter():
        assert (fusible_lora(layer.eval()) is not None) == (fusible or "lora_dropout" in options)
    layer.base_layer.weight.requires_grad_()
    assert fusible_lora(layer) is None


def test_virtual_tokens_are_refused(tiny_llama):
    check_packable(tiny_llama())
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="PROMPT_TUNING adds virtual tokens"):
        check_packable(model)


def test_without_an_adapter_peft_is_not_imported():
    code = "import sys, fastalign.models.scoring, fastalign.regularizers.ewc; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda peft: {"r": 3}, "peft_config is a dict; pass a peft.LoraConfig"),
        (lambda peft: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), "ADALORA moves ranks"),
        (
            lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "PROMPT_TUNING adds virtual",
        ),
        (
            lambda peft: peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5]),
            "alora_invocation_tokens is set",
        ),
        (
            lambda peft: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
            r"modules_to_save is \['lm_head'\].*dtype='float32'",
        ),
        (lambda peft: peft.LoraConfig(target_modules=["foo"]), "Its linear layers are down_proj, gate_proj"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused(tiny_llama, make, said):
    import peft

    with pytest.raises(ModelError, match=said):
        add_adapter(tiny_llama(dtype=torch.bfloat16), make(peft), seed=0)
