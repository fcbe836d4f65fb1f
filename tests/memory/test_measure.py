from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from fastalign.data.packing import pack
from fastalign.memory import measure
from fastalign.memory.parts import Setting, layer_bytes, parts
from fastalign.memory.shapes import shapes_of
from fastalign.models.scoring import prepare


def test_peak_is_at_least_what_is_resident_now():
    block = torch.ones(2**22)  # 16 MiB, touched
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    assert block.sum() > 0
    # the kernel counts pages per thread and adds them up now and then
    assert measure.peak_bytes("cpu") >= resident - block.nbytes // 2
    assert measure.peak_bytes("cpu") < 2**42  # bytes, not kilobytes twice


def model_of(layers: int):
    config = tf.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4
    )
    return tf.LlamaForCausalLM(config)


def kept_for_backward(model, tokens: int) -> int:
    """Bytes that autograd holds at the end of a forward pass, beside parameters."""
    prepare(model)
    half = tokens // 2
    batch = pack([{"prompt_ids": [5] * half, "completion_ids": [[6] * (tokens - half)]}])
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        model.train()(packed=batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("layers", [2, 4])
def test_predicted_activations_are_those_that_autograd_keeps(layers):
    model, tokens = model_of(layers), 128
    shapes = shapes_of(model.config.to_dict())
    predicted = layers * layer_bytes(shapes, Setting(tokens, rank=0, size=4))
    kept = kept_for_backward(model, tokens)  # those of the layers, of the last norm and of the output layer
    head = tokens // 2 * (300 * 4 + 64 * 4) + tokens * 64 * 4
    assert predicted <= kept <= 1.03 * (predicted + head)


def test_prediction_is_the_sum_of_the_plans_parts():
    model = model_of(2)
    shapes = shapes_of(model.config.to_dict())
    assert shapes.parameters == sum(p.numel() for p in model.parameters())
    setting = Setting(64, rank=0, size=4)
    assert measure.predict(model, tokens=64) == sum(parts(shapes, setting).values())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert measure.predict(adapted, tokens=64) == sum(parts(shapes, setting._replace(rank=2)).values())


def test_checkpointing_is_predicted_to_need_less():
    model = model_of(8)
    nothing = measure.predict(model, tokens=0)
    kept = measure.predict(model, tokens=10_000) - nothing
    assert measure.predict(model, tokens=10_000, checkpointing=True) - nothing < 0.6 * kept


def test_a_model_outside_of_the_table_is_predicted_too():
    config = tf.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4)
    model = tf.GPT2LMHeadModel(config)
    assert measure.predict(model, tokens=64) > 4 * 4 * sum(p.numel() for p in model.parameters())
