import os
import subprocess
import sys

import pytest

from fastalign.cli.main import main


def test_without_a_limit_it_says_the_parts(large_run, capsys):
    assert main(["plan", large_run, "--tokens", "2048", "--device", "cuda"]) == 0
    said = capsys.readouterr().out
    assert "8,030,261,248 parameters" in said
    assert "weights                    16.061 GB" in said
    assert "optimiser                   0.336 GB" in said  # two float32 moments of 41,943,040 numbers


def test_it_chooses_what_fits_and_says_why_others_lost(large_run, capsys):
    assert main(["plan", large_run, "--tokens", "4096", "--device", "cuda", "--memory", "24GB"]) == 0
    said = capsys.readouterr().out
    assert said.count("Fits in 24.00 GB") == 1
    assert "too much" in said
    assert "x the time" in said


def test_what_does_not_fit_exits_with_1_and_a_remedy(large_run, capsys):
    assert main(["plan", large_run, "--device", "cuda", "--memory", "6GB"]) == 1
    said = capsys.readouterr().out
    assert "Does not fit in 6.00 GB, by" in said
    assert "take a smaller model" in said
    assert main(["plan", large_run, "max_length=65536", "--device", "cuda", "--memory", "10GB"]) == 1
    assert "tokens per micro-batch (max_length)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "16"], "give a number above 0 with a unit"),
        (["memory_limit=big"], "memory_limit is 'big'"),
        (["--tokens", "0"], "--tokens is 0"),
        (["max_length="], "give --tokens"),
        (["optim=adafactor"], "optim is 'adafactor'"),
        (["lora_targets=q_proj,foo"], "'foo' is no layer that plan knows; it knows all-linear, default and q_proj"),
        (["torch_compile=true"], "torch_compile is True"),
        (["dtype=float8"], "dtype is 'float8'"),
        (["model=organisation/name"], "nothing is downloaded"),
        (["regularizers=[{name: l2_sp, strength: 0.1}]"], "regularizers is l2_sp"),
        (["adapter=continue"], "adapter is 'continue'"),
        (["method=distill", "teacher=organisation/name"], "distill"),
        (["lora_rank=0", "bf16=true"], "bf16 is True"),
    ],
)
def test_what_cannot_be_said_exits_with_2_and_one_sentence(large_run, words, message, capsys):
    assert main(["plan", large_run, *(w for w in words if "=" in w), *(w for w in words if "=" not in w)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_nothing_heavy_is_imported(large_run):
    code = (
        "import sys; from fastalign.cli.main import main; main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    words = ["plan", large_run, "--memory", "16GB"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
