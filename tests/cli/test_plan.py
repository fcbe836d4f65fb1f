import json
import os
import subprocess
import sys

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


def test_without_a_limit_it_says_the_parts(config, capsys):
    assert main(["plan", config, "--tokens", "2048", "--device", "cuda"]) == 0
    said = capsys.readouterr().out
    assert "8,030,261,248 parameters" in said
    assert "weights                    16.061 GB" in said
    assert "optimiser                   0.336 GB" in said  # two float32 moments of 41,943,040 numbers


def test_it_chooses_what_fits_and_says_why_others_lost(config, capsys):
    assert main(["plan", config, "--tokens", "4096", "--device", "cuda", "--memory", "24GB"]) == 0
    said = capsys.readouterr().out
    assert said.count("Fits in 24.00 GB") == 1
    assert "too much" in said
    assert "x the time" in said


def test_what_does_not_fit_exits_with_1_and_a_remedy(config, capsys):
    assert main(["plan", config, "--device", "cuda", "--memory", "6GB"]) == 1
    said = capsys.readouterr().out
    assert "Does not fit in 6.00 GB, by" in said
    assert "take a smaller model" in said
    assert main(["plan", config, "max_length=65536", "--device", "cuda", "--memory", "10GB"]) == 1
    assert "tokens per micro-batch (max_length)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "16"], "give a number above 0 with a unit"),
        (["memory_limit=big"], "memory_limit is 'big'"),
        (["--tokens", "0"], "--tokens is 0"),
        (["max_length="], "give --tokens"),
        (["optim=adafactor"], "optim is 'adafactor'"),
        (["lora_targets=q_proj"], "plan knows all-linear only"),
        (["torch_compile=true"], "torch_compile is True"),
        (["dtype=float8"], "dtype is 'float8'"),
        (["model=organisation/name"], "nothing is downloaded"),
        (["regularizers=[{name: l2_sp, strength: 0.1}]"], "regularizers is l2_sp"),
        (["adapter=continue"], "adapter is 'continue'"),
        (["method=distill", "teacher=organisation/name"], "distill"),
        (["lora_rank=0", "bf16=true"], "bf16 is True"),
    ],
)
def test_what_cannot_be_said_exits_with_2_and_one_sentence(config, words, message, capsys):
    assert main(["plan", config, *(w for w in words if "=" in w), *(w for w in words if "=" not in w)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_nothing_heavy_is_imported(config):
    code = (
        "import sys; from fastalign.cli.main import main; main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    words = ["plan", config, "--memory", "16GB"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
