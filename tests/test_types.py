"""What a type checker sees of fastalign, and with it an editor: the classes and functions, not Any."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

RIGHT = """
import torch
from fastalign import EWC, L2SP, PreferenceConfig, PreferenceTrainer, SFTConfig, linear_logprobs

config = PreferenceConfig(beta=0.1, loss_type="simpo", max_steps=3)
reveal_type(PreferenceTrainer)
reveal_type(config.beta)
terms = [EWC(fisher="fisher.safetensors", strength=1.0), L2SP(strength=0.1)]
SFTConfig(learning_rate=1e-4)
hidden, weight, targets = torch.randn(4, 8), torch.randn(9, 8), torch.zeros(4, dtype=torch.int64)
linear_logprobs(hidden, weight, targets).sum().backward()
logprobs, entropy = linear_logprobs(hidden, weight, targets, entropy=True)
(logprobs.mean() + entropy.mean()).backward()
"""
WRONG = {
    "PreferenceConfig(bata=0.1)": "bata",
    "PreferenceConfig(beta='high')": "beta",
    "EWC(fisher='f')": "strength",
    "fastalign.PreferenceTrainr": "PreferenceTrainr",
    "from fastalign import SFTConfg": "SFTConfg",
}


@pytest.mark.slow
def test_mistakes_in_a_users_code_are_type_errors(tmp_path):
    """One run of pyright, which takes seconds, over a file without mistakes and a file with one in each line."""
    (tmp_path / "pyrightconfig.json").write_text("{}")  # else one of a folder above would hold
    (tmp_path / "right.py").write_text(RIGHT)
    head = "import fastalign\nfrom fastalign import EWC, PreferenceConfig\n"
    (tmp_path / "wrong.py").write_text(head + "\n".join(WRONG) + "\n")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    right = [one for one in found if one["file"].endswith("right.py")]
    assert [one["message"] for one in right if one["severity"] == "error"] == []
    revealed = " ".join(one["message"] for one in right)
    assert "type[PreferenceTrainer]" in revealed and "float | None" in revealed
    errors = {one["range"]["start"]["line"] - 2: one["message"] for one in found if one["file"].endswith("wrong.py")}
    for line, (code, name) in enumerate(WRONG.items()):
        assert name in errors.get(line, ""), f"pyright does not object to {code}"
