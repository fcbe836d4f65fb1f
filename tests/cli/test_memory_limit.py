import json

import pytest

from fastalign.cli.main import main

SIZES = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """A configuration of a model of 8 billion parameters, of which only the config.json is there."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    (tmp_path / "rows.jsonl").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text("method: dpo\nmodel: ../" + tmp_path.name + "\ntrain: ./rows.jsonl\ndtype: bfloat16\n")
    return str(path)


def test_a_limit_in_the_configuration_refuses_the_run_before_it_loads(config, capsys):
    assert main(["train", config, "memory_limit=6GB"]) == 2
    said = capsys.readouterr().err
    assert "memory_limit is 6GB, but the run is planned to need" in said
