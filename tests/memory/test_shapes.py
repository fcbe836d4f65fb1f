import json

import pytest
import torch
import transformers as tf

from fastalign.errors import ConfigError, ModelError
from fastalign.memory.shapes import read_shapes, shapes_of

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"])
def test_parameters_are_those_of_the_model(kind):
    config = tf.AutoConfig.for_model(kind, **SIZES, pad_token_id=0)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    assert shapes_of(config.to_dict()).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "mamba"}, "model_type is 'mamba'"), ({"hidden_size": None}, "hidden_size of config.json is None")],
)
def test_what_cannot_be_planned_is_refused(change, message):
    with pytest.raises(ModelError, match=message):
        shapes_of({"model_type": "llama", **SIZES, **change})


def test_a_folder_is_read_without_its_weights(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*config\.json"):
        read_shapes(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_shapes(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds list"):
        read_shapes(str(tmp_path))
    stored = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **stored}))
    assert read_shapes(str(tmp_path))[1] == "bitsandbytes"
