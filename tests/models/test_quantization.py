"""Models with weights in 4 or 8 bits: they train, evaluate and save as their dequantised copies do."""

from __future__ import annotations

import contextlib
import copy
import shutil
import sys
import types

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fastalign.data.packing import lay_out
from fastalign.errors import ConfigError, ModelError
from fastalign.fisher.diagonal import fisher_diagonal
from fastalign.models import linear
from fastalign.models.fit import check_fit
from fastalign.models.head import output_head
from fastalign.models.loading import load_model
from fastalign.models.quantization import (
    QuantizedWeight,
    check_order,
    float_weight,
    import_bitsandbytes,
    quantized_layers,
    quantized_weight,
    use_training_product,
)
from fastalign.models.ready import check_trainable
from fastalign.models.scoring import prepare
from fastalign.regularizers.ewc import EWC

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
FOUR_BITS = [kind for kind in KINDS if kind != "int8"]
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
EXAMPLES = [{"prompt_ids": [5, 6, 7], "completion_ids": [[8, 9], [10, 11, 12]]}]


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory):
    """A folder with a Llama in float32 whose widths are multiples of a quantised block."""
    folder = tmp_path_factory.mktemp("plain")
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.3, bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantized(folder, kind: str, **options):
    """The model as a user loads it. Every layer believes that the CPU has bfloat16 instructions, so that it repacks."""
    config = BitsAndBytesConfig(**KINDS[kind], bnb_4bit_compute_dtype=torch.float32, **options)
    return repacking(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32))


def repacking(model):
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    return model


def dequantized(folder, model, dtype=torch.float32):
    """The unquantised model with the numbers that the quantised model computes with."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        four_bits = hasattr(weight, "quant_state")
        if four_bits or (isinstance(weight, torch.Tensor) and not weight.is_floating_point()):
            values = (
                dequantize_4bit(weight.data, weight.quant_state)
                if four_bits
                else weight.data.float() * (weight.SCB.view(-1, 1) / 127)
            )
            plain.get_submodule(name).weight.data.copy_(values)
    return plain


def adapted(model):
    """The model with an adapter on every linear layer, of the same random numbers each time."""
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def step(model, layout):
    """The loss of one batch and the gradient of every adapter."""
    model.train()
    model.zero_grad()
    loss = -model(packed=lay_out(EXAMPLES, layout, pad_token_id=0)).logprobs.mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(ours, theirs):
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.any(), name
        scale = their_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_trains_as_its_dequantised_copy_also_after_evaluating_generating_and_saving(plain_dir, tmp_path, kind):
    base = quantized(plain_dir, kind)
    copied = adapted(dequantized(plain_dir, base))
    model = adapted(base)
    layouts = [prepare(m) for m in (model, copied)]
    expected = step(copied, layouts[1])
    assert_same_step(step(model, layouts[0]), expected)
    model.eval()
    with torch.no_grad():
        inputs = torch.tensor([[5, 6, 7, 8]])
        torch.testing.assert_close(model(inputs).logits, copied.eval()(inputs).logits, rtol=1e-5, atol=1e-4)
        generated = [m.generate(input_ids=inputs, max_new_tokens=4, do_sample=False) for m in (model, copied)]
    assert torch.equal(*generated)
    model.save_pretrained(tmp_path / "adapter")
    model.state_dict()
    assert_same_step(step(model, layouts[0]), expected)
    again = peft.PeftModel.from_pretrained(quantized(plain_dir, kind), tmp_path / "adapter", is_trainable=True)
    assert_same_step(step(again, prepare(again)), expected)


@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_a_run_that_evaluates_saves_and_resumes_has_the_losses_of_the_copy(
    plain_dir, pairs, make_trainer, tmp_path, kind
):
    lora = peft.LoraConfig(**LORA)
    options = {"max_steps": 3, "learning_rate": 0.1, "eval_strategy": "steps", "eval_steps": 1}

    def run(model, resume=None, **more):
        trainer = make_trainer(model, pairs, eval_rows=pairs[:4], peft_config=lora, **options, **more)
        trainer.train(resume_from_checkpoint=resume)
        history = trainer.state.log_history
        return trainer, [row[key] for row in history for key in ("loss", "eval_loss") if key in row]

    base = quantized(plain_dir, kind)
    copied = dequantized(plain_dir, base)
    trainer, losses = run(base, save_strategy="steps", save_steps=1)
    assert all(p.any() for name, p in trainer.model.named_parameters() if "lora_B" in name)
    assert losses[0] != losses[2]
    kept = tmp_path / "kept" / "checkpoint-1"  # a run with the same folder clears it
    shutil.copytree(f"{trainer.args.output_dir}/checkpoint-1", kept)
    assert losses == pytest.approx(run(copied)[1], abs=1e-5)
    assert run(quantized(plain_dir, kind), resume=kept)[1] == losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_is_read_back_bit_by_bit(plain_dir, tmp_path, kind):
    model = quantized(plain_dir, kind)
    prepare(model)
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    model.save_pretrained(tmp_path)
    after = load_model(tmp_path).state_dict()
    assert any(not value.is_floating_point() for value in before.values())
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_only_a_guarded_layer_keeps_its_order(plain_dir, kind):
    model = quantized(plain_dir, kind)
    guarded, unguarded = model.model.layers[0].mlp.up_proj, copy.deepcopy(model.model.layers[0].mlp.up_proj)
    packed = guarded.weight.data.clone()
    use_training_product(model)
    x = torch.randn(3, 64)
    with torch.no_grad():
        guarded.eval()(x)
        # Where the CPU lacks the instructions, the product after the repacking fails.
        with contextlib.suppress(Exception):
            unguarded.eval()(x)
    assert torch.equal(guarded.weight.data, packed)
    assert unguarded.weight.quant_state.packing_format_for_cpu
    check_order(model)
    with pytest.raises(ModelError, match="rearranged the weights of 1 layer"):
        check_order(nn.ModuleDict({"up": unguarded}))


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("saved", [False, True])
def test_a_repacked_model_is_refused(plain_dir, kind, saved):
    """Saving undoes the repacking, but not what it did to the scales."""
    model = quantized(plain_dir, kind)
    layer = model.model.layers[1].self_attn.q_proj
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    if saved:
        layer.state_dict()
    message = r"rearranged the weights of 1 layer \(model\.layers\.1\.self_attn\.q_proj\).*: load the model anew"
    for check in (prepare, check_trainable):
        with pytest.raises(ModelError, match=message):
            check(model)
    with pytest.raises(ModelError, match="rearranged"):
        float_weight(layer.weight)
    with pytest.raises(ModelError, match=message):
        check_trainable(adapted(model))


def test_a_folder_that_was_saved_after_repacking_is_refused(plain_dir, tmp_path):
    model = quantized(plain_dir, "nf4")
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="rearranged the weights of 2 layers"):
        load_model(tmp_path)


def young(model, dtype):
    """The model in a dtype, with an adapter so small that one rounding of the layer's result loses most of it."""
    model = adapted(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.02)
        if "lora_" in name:  # peft draws the factors in the dtype of the weight that they lie on
            parameter.data = parameter.data.bfloat16().float()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    return model


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_the_sum_of_layer_and_adapter_is_rounded_once(plain_dir, monkeypatch, kind, native):
    """Bit for bit the step of an unquantised layer that holds the dequantised weight."""
    native &= linear.has_native_matmul(torch.bfloat16)  # else the products below would be emulated at length
    monkeypatch.setattr(linear, "has_native_matmul", lambda dtype: native or dtype == torch.float32)
    config = BitsAndBytesConfig(**KINDS[kind], bnb_4bit_compute_dtype=torch.bfloat16)
    base = repacking(AutoModelForCausalLM.from_pretrained(plain_dir, quantization_config=config, dtype=torch.bfloat16))
    copied = young(dequantized(plain_dir, base, torch.bfloat16), torch.bfloat16)
    model = young(base, torch.bfloat16)
    layouts = [prepare(m) for m in (model, copied)]
    assert all("forward" in vars(m) for m in model.modules() if type(m).__name__ == "LlamaMLP")
    (loss, gradients), (expected, expected_gradients) = step(model, layouts[0]), step(copied, layouts[1])
    assert torch.equal(loss, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name
    with model.disable_adapter(), torch.no_grad():
        reference = model(packed=lay_out(EXAMPLES, layouts[0], pad_token_id=0)).logprobs
    assert not torch.equal(reference.mean(), -loss), "the adapter has an effect"


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_are_off_give_the_bits_of_adapters_that_are_zero(plain_dir, kind):
    model = adapted(quantized(plain_dir, kind))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    batch = lay_out(EXAMPLES, prepare(model), pad_token_id=0)
    policy = model.train()(packed=batch).logprobs
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model.eval()(packed=batch).logprobs, policy)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_in_its_own_dtype(plain_dir, compute):
    """Wider than its input: rounded once, at the end. Narrower: bitsandbytes' own product."""
    config = BitsAndBytesConfig(**KINDS["nf4"], bnb_4bit_compute_dtype=compute)
    model = adapted(AutoModelForCausalLM.from_pretrained(plain_dir, quantization_config=config, dtype=torch.float32))
    prepare(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    weight = quantized_weight(layer.base_layer).dequantize(torch.float32)
    x = torch.randn(5, 64)
    full = weight + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if compute == torch.float32:
        found = layer(x.bfloat16())
        exact = x.bfloat16().double() @ full.double().t()
        assert found.dtype == torch.bfloat16
        assert ((found - exact).abs() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-5).all()
    else:
        assert layer(x).dtype == torch.float32
        assert torch.equal(layer(x), type(layer).forward(layer, x))


def test_bytes_that_are_called_bfloat16_are_quantised_too(plain_dir, pairs, make_trainer):
    model = quantized(plain_dir, "nf4", bnb_4bit_quant_storage=torch.bfloat16)
    assert len(quantized_layers(model)) == 14
    with pytest.raises(ModelError, match="14 layers of the model are quantised"):
        make_trainer(model, pairs)
    copied = adapted(dequantized(plain_dir, model))
    model = adapted(model)
    layouts = [prepare(m) for m in (model, copied)]
    assert_same_step(step(model, layouts[0]), step(copied, layouts[1]))


def test_floating_point_is_not_copied():
    weight = torch.randn(3, 2, dtype=torch.bfloat16)
    assert float_weight(weight) is weight


def test_an_unknown_quantisation_is_refused():
    with pytest.raises(ModelError, match=r"holds torch\.int8 weights of an unknown quantisation; load it unquantised"):
        float_weight(torch.zeros(3, 2, dtype=torch.int8))


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_an_output_layer_in_four_bits_is_dequantised(plain_dir, kind):
    model = quantized(plain_dir, kind, llm_int8_skip_modules=["none"])
    weight = model.lm_head.weight
    assert torch.equal(float_weight(weight), dequantize_4bit(weight.data, weight.quant_state))
    plain = dequantized(plain_dir, model)
    scores = [m(packed=lay_out(EXAMPLES, prepare(m), pad_token_id=0)).logprobs for m in (model, plain)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, r"need bitsandbytes, which cannot be imported .*: pip install 'fastalign\[quant\]'"),
        ("0.49.9", r"bitsandbytes is 0\.49\.9; .* 0\.50 or newer: pip install 'fastalign\[quant\]'"),
    ],
)
def test_a_missing_or_old_bitsandbytes_is_named(monkeypatch, module, message):
    found = module and types.SimpleNamespace(__version__=module)
    monkeypatch.setitem(sys.modules, "bitsandbytes", found)
    with pytest.raises(ModelError, match=message):
        import_bitsandbytes()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_are_not_trained_without_an_adapter(plain_dir, pairs, make_trainer, kind):
    with pytest.raises(ModelError, match=r"14 layers of the model are quantised .*: pass a peft_config"):
        make_trainer(quantized(plain_dir, kind), pairs)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_output_layer_that_is_tied_is_refused(plain_dir, kind):
    options = {"llm_int8_skip_modules": ["none"]}
    model = quantized(plain_dir, kind, **options)
    # What transformers makes of a model with tied embeddings.
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(
        ModelError, match=r"lm_head is quantised, but its weight .* llm_int8_skip_modules=\['lm_head'\]"
    ):
        prepare(model)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_fisher_information_needs_the_weights_unquantised(plain_dir, kind):
    model = quantized(plain_dir, kind)
    with pytest.raises(ModelError, match=r"14 layers of the model are quantised .*: load it unquantised"):
        fisher_diagonal(model, EXAMPLES)
    adapter = adapted(model)
    assert len(fisher_diagonal(adapter, EXAMPLES)) == 28  # the factors of an adapter have gradients


def test_ewc_of_a_quantised_model_names_the_remedy(plain_dir, pairs, make_trainer):
    """The information of the unquantised model holds the adapter; that of packed weights has another shape."""
    weights = dict(dequantized(plain_dir, quantized(plain_dir, "nf4")).named_parameters())
    fisher = {name: torch.ones_like(weight) for name, weight in weights.items()}
    layer = "model.layers.0.mlp.up_proj.weight"
    packed = fisher | {layer: torch.ones(128 * 64 // 2, 1)}
    partial = {name: value for name, value in fisher.items() if name != layer}
    for wrong, message in ((packed, r"is \(4096, 1\), the weight \(128, 64\)"), (partial, "lacks 1 of the 14 weights")):
        with pytest.raises(ModelError, match=rf"{message}.*: compute it again, for the unquantised model"):
            make_trainer(
                quantized(plain_dir, "nf4"), pairs, peft_config=peft.LoraConfig(**LORA), regularizers=[EWC(wrong, 1.0)]
            )
    make_trainer(
        quantized(plain_dir, "nf4"), pairs, peft_config=peft.LoraConfig(**LORA), regularizers=[EWC(fisher, 1.0)]
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_output_layer_cannot_be_resized(plain_dir, tmp_path, kind):
    quantized(plain_dir, kind, llm_int8_skip_modules=["none"]).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    message = r"the output layer is quantised.*: call resize_token_embeddings before"
    with pytest.raises(ModelError, match=message):
        model.resize_token_embeddings(300)
    with pytest.raises(ModelError, match=r"knows 259: .* before the model is quantised"):
        check_fit([{"prompt_ids": [259], "completion_ids": [[1]]}], model)
    plain_head = quantized(plain_dir, kind)
    prepare(plain_head)
    plain_head.resize_token_embeddings(300)
    assert plain_head.lm_head.weight.shape[0] == 300


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_folder_says_what_it_cannot_be_loaded_as(plain_dir, tmp_path, kind, monkeypatch):
    quantized(plain_dir, kind).save_pretrained(tmp_path)
    monkeypatch.setattr("fastalign.models.loading.AutoModelForCausalLM", None)  # refused before anything is loaded
    with pytest.raises(ConfigError, match=r"dtype is 'float32', but .* is quantised.*: leave dtype out"):
        load_model(tmp_path, dtype="float32")
    with pytest.raises(ModelError, match=r"is quantised, .*: train an adapter .*, or load it unquantised"):
        load_model(tmp_path, for_adapter=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match="need bitsandbytes"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_quantises_as_transformers_does(plain_dir, kind):
    name, *twice = kind.split()
    model = load_model(plain_dir, dtype="float32", quantization=name, double_quantization=bool(twice))
    expected = quantized(plain_dir, kind).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(found[name], value), name
    if kind != "int8":
        assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.float32


def test_a_run_quantises_the_model_it_loads(plain_dir, pairs, make_trainer):
    trainer = make_trainer(plain_dir, pairs, peft_config=peft.LoraConfig(**LORA), quantization="nf4")
    trainer.train()
    assert len(quantized_layers(trainer.model)) == 14
    with pytest.raises(ConfigError, match="quantization is 'nf4', but the model is loaded already"):
        make_trainer(quantized(plain_dir, "fp4"), pairs, peft_config=peft.LoraConfig(**LORA), quantization="nf4")
    with pytest.raises(ModelError, match="train an adapter"):
        make_trainer(plain_dir, pairs, quantization="nf4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "nf5"}, "quantization is 'nf5'"),
        ({"quantization": "int8", "double_quantization": True}, "double_quantization .* nf4 or fp4, not 'int8'"),
        ({"double_quantization": True}, "double_quantization .* nf4 or fp4, not 'none'"),
    ],
)
def test_options_of_quantisation_are_checked(plain_dir, options, message):
    with pytest.raises(ConfigError, match=message):
        load_model(plain_dir, **options)


def test_what_is_quantised_already_is_not_quantised_again(plain_dir, tmp_path):
    quantized(plain_dir, "nf4").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"quantization is 'int8', but .* is quantised already: leave"):
        load_model(tmp_path, quantization="int8")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"quantization is 'nf4', but .* is a GGUF file"):
        load_model(tmp_path / "weights.gguf", quantization="nf4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 48])
def test_rows_are_dequantised_with_the_bits_of_the_whole(kind, width):
    """Blocks begin inside rows where the width is no multiple of them; twice quantised scales have blocks of blocks."""
    torch.manual_seed(0)
    weight = torch.randn(600, width)
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(width, 600, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    else:
        options = {"quant_type": kind[:3], "compress_statistics": "twice" in kind}
        layer = bitsandbytes.nn.Linear4bit(width, 600, bias=False, compute_dtype=torch.float32, **options)
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options)
    packed = quantized_weight(layer.to("cpu"))
    assert packed.row_multiple == (4 if width == 48 and kind != "int8" else 1)
    for dtype in (torch.float32, torch.bfloat16):
        whole = packed.dequantize(dtype)
        assert (whole - weight).norm() / weight.norm() < 0.15
        for start, stop in ((0, 600), (400, 600), (96, 357)):
            out = torch.empty(stop - start, width + 3, dtype=dtype)[:, :width]
            packed.dequantize_rows(start, stop, out)
            assert torch.equal(out, whole[start:stop])
    assert packed.first(7).shape == (7, width)
    assert torch.equal(packed.first(7).dequantize(torch.float32), packed.dequantize(torch.float32)[:7])


def test_a_product_that_bitsandbytes_gets_wrong_is_refused():
    """Its CPU kernel reads the scales of another block where rows are no whole blocks: 40 % off."""
    layer = bitsandbytes.nn.Linear4bit(48, 8, bias=False, compute_dtype=torch.bfloat16)
    layer.to("cpu")(torch.zeros(1, 48))  # quantises
    with pytest.raises(ModelError, match="has 48 inputs, no multiple of its blocks of 64"):
        linear._quantized_linear(layer, torch.zeros(1, 48, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_output_layer_trains_as_its_dequantised_copy(plain_dir, kind):
    base = load_model(plain_dir, dtype="float32", quantization=kind, quantize_head=True)
    assert "lm_head" in quantized_layers(base)
    assert "lm_head" not in quantized_layers(load_model(plain_dir, dtype="float32", quantization=kind))
    copied = adapted(dequantized(plain_dir, base))
    model = adapted(base)
    layouts = [prepare(m) for m in (model, copied)]
    assert output_head(model.get_base_model()).lora is None  # peft leaves the output layer out of all-linear
    assert isinstance(output_head(model.get_base_model()).weight, QuantizedWeight)
    assert_same_step(step(model, layouts[0]), step(copied, layouts[1]))


def test_a_tied_output_layer_cannot_be_quantised(model_dir, plain_dir):
    with pytest.raises(ConfigError, match=r"quantize_head is True, but the output layer of .* is tied"):
        load_model(model_dir, quantization="nf4", quantize_head=True)
    with pytest.raises(ConfigError, match="quantize_head is True and quantization 'none'"):
        load_model(plain_dir, quantize_head=True)
