"""The output layer, as it is read from models and from what peft puts around it."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoHaConfig, LoraConfig, TrainableTokensConfig, get_peft_model

from fastalign.data.packing import lay_out
from fastalign.errors import ModelError
from fastalign.fisher.output_layer import HeadFisher
from fastalign.models.head import Head, output_head, token_divergence
from fastalign.models.scoring import prepare
from fastalign.reference import logits_divergence

SIZES = {
    "vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))


def test_what_the_head_is_made_of_is_read():
    models = {
        "plain": llama(),
        "bias": tf.PhiForCausalLM(tf.PhiConfig(**SIZES)),
        "soft cap": tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)),
        "logit scale": tf.CohereForCausalLM(tf.CohereConfig(**SIZES, logit_scale=0.25)),
        "logits scaling": tf.GraniteForCausalLM(tf.GraniteConfig(**SIZES, logits_scaling=4.0)),
    }
    heads = {kind: output_head(model) for kind, model in models.items()}
    assert heads["soft cap"].softcap == 3.0
    assert heads["logit scale"].logit_scale == heads["logits scaling"].logit_scale == 0.25
    assert heads["bias"].bias is models["bias"].lm_head.bias
    assert heads["plain"].options() == {"bias": None, "logit_scale": 1.0, "softcap": None}


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_adapters_without_an_equivalent_weight_are_refused(options):
    model = get_peft_model(llama(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False, **options))
    with pytest.raises(ModelError, match="leave the output layer out of target_modules"):
        prepare(model)


def test_adapters_of_other_kinds_are_refused():
    """Their effect on the weight is unknown here, and a new one changes nothing that a comparison could find."""
    model = get_peft_model(llama(), LoHaConfig(target_modules=["lm_head"]))
    with pytest.raises(ModelError, match=r"adapter of the kind peft\.tuners\.loha.*: use LoRA"):
        prepare(model)


def test_a_part_of_the_vocabulary():
    head = Head(torch.randn(7, 3, requires_grad=True), torch.randn(7), 2.0, 5.0)
    assert head.first(7) is head and head.first(9) is head
    part = head.first(4).detach()
    assert torch.equal(part.weight, head.weight[:4]) and torch.equal(part.bias, head.bias[:4])
    assert (part.logit_scale, part.softcap, part.weight.requires_grad) == (2.0, 5.0, False)


def test_divergence_of_two_models_with_different_output_layers():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator).double() for shape in ((5, 3), (7, 3), (7,)))
    others, other_weight = (torch.randn(*shape, generator=generator).double() for shape in ((5, 4), (7, 4)))
    found = token_divergence(
        hidden, Head(weight, bias, 0.5, None), others, Head(other_weight, None, 1.0, 2.0), divergence="reverse_kl"
    )
    ours, theirs = 0.5 * (hidden @ weight.T + bias), 2.0 * torch.tanh(others @ other_weight.T / 2.0)
    expected = logits_divergence(ours, theirs, divergence="reverse_kl")
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-9)


def test_an_adapter_on_the_output_layer_is_not_folded_into_the_weight():
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
    head = output_head(model.get_base_model())
    assert isinstance(head.weight, torch.Tensor) and head.lora is not None
    hidden, targets = torch.randn(4, 32), torch.tensor([1, 2, 3, 4])
    dense = head.dense()
    found, expected = head.logprobs(hidden, targets), dense.logprobs(hidden, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    factors = [head.lora[0], head.lora[1]]
    for a, e in zip(*(torch.autograd.grad(t.sum(), factors) for t in (found, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    part = head.first(40).detach()
    torch.testing.assert_close(part.dense().weight, dense.weight[:40].detach())
    assert not part.lora[1].requires_grad
    model.get_base_model().lm_head.base_layer.weight.requires_grad_()  # then both get their gradient from the sum
    assert output_head(model.get_base_model()).lora is None
    with model.disable_adapter():
        assert output_head(model.get_base_model()).lora is None


def test_two_adapters_add_up():
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, lora_alpha=5))
    model.base_model.set_adapter(["default", "second"])
    head = output_head(model.get_base_model())
    assert head.lora[0].shape == (5, 32)
    layer, hidden = model.get_base_model().lm_head, torch.randn(4, 32)
    torch.testing.assert_close(hidden @ head.dense().weight.T, layer(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["tied", "untied", "with LoRA", "alone"])
def test_trained_rows_of_new_tokens(kind):
    """The log-probabilities and gradients are those of the stock model, whose weight peft copies with the rows."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=kind != "untied"))
    tokens = {"embed_tokens": [3, 60]} | ({"lm_head": [3, 60]} if kind == "untied" else {})
    if kind == "alone":
        config = TrainableTokensConfig(token_indices=[3, 60], target_modules=["embed_tokens"])
    else:
        modules = ["q_proj", "lm_head"] if kind == "with LoRA" else ["q_proj"]
        config = LoraConfig(target_modules=modules, trainable_token_indices=tokens, init_lora_weights=False)
    model = get_peft_model(model, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if "trainable_tokens" in name:
            parameter.data += 0.5
    layout, base = prepare(model), model.get_base_model()
    assert output_head(base).new_rows[0].tolist() == [3, 60]
    ids = torch.tensor([[5, 6, 3, 8, 60, 12]])
    batch = lay_out([{"prompt_ids": [5, 6, 3], "completion_ids": [[8, 60, 12]]}], layout, pad_token_id=0)
    ours = model(packed=batch).logprobs
    theirs = model(input_ids=ids).logits.log_softmax(-1)[0, 2:5].gather(1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(t.sum(), list(trained.values())) for t in (ours, theirs)]
    for name, a, e in zip(trained, *grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5, msg=name)
    assert output_head(base).first(60).new_rows[0].tolist() == [3] and output_head(base).first(3).new_rows is None
    with model.disable_adapter():
        assert output_head(base).new_rows is None
    with pytest.raises(ModelError, match="trained rows of an embedding"):
        HeadFisher(base.get_output_embeddings(), {id(p): name for name, p in trained.items()}, {})
