from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from fastalign.data.packing import pack
from fastalign.memory import measure
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
    predicted = measure.predict(model, tokens=tokens) - measure.predict(model, tokens=0)
    kept = kept_for_backward(model, tokens)
    assert 0.5 * kept <= predicted <= 2 * kept  # a prediction before the fact, to see what fits


def test_prediction_counts_weights_gradients_and_moments():
    model = model_of(2)
    parameters = sum(p.numel() for p in model.parameters())
    # float32 weights, gradients and AdamW's two moments
    assert measure.predict(model, tokens=0) == measure._CPU_BASE + parameters * 4 * 4
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert measure.predict(adapted, tokens=0) == measure._CPU_BASE + (parameters + trained) * 4 + trained * 12


def test_checkpointing_is_predicted_to_need_less():
    model = model_of(8)
    assert (
        measure.predict(model, tokens=1000, checkpointing=True)
        < 0.5 * (measure.predict(model, tokens=1000) - measure._CPU_BASE) + measure._CPU_BASE
    )
