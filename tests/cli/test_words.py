"""TRL's way to write options on the command line."""

from __future__ import annotations

import pytest

from fastalign.cli.configuration import read_arguments
from fastalign.cli.words import as_assignments


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--beta", "0.2", "--learning-rate", "-1e-4"], {"beta": 0.2, "learning_rate": "-1e-4"}),
        (["--beta=0.2", "max_steps=3"], {"beta": 0.2, "max_steps": 3}),
        (["--use_peft", "--lora_r", "8"], {"use_peft": True, "lora_r": 8}),
        (["--use_peft", "max_steps=3"], {"use_peft": True, "max_steps": 3}),
        (["--no_gradient_checkpointing"], {"gradient_checkpointing": False}),
        (["--lora_target_modules", "q_proj", "v_proj"], {"lora_target_modules": ["q_proj", "v_proj"]}),
        (["--loss_weights", "1.0", "0.5", "--bf16", "False"], {"loss_weights": [1.0, 0.5], "bf16": False}),
    ],
)
def test_flags_become_assignments(words, options):
    assert read_arguments(as_assignments(words)) == options


def test_the_commands_own_arguments_stay():
    assert as_assignments(["--config", "run.yaml", "--beta", "0.2"]) == ["--config", "run.yaml", "beta=0.2"]
    assert as_assignments(["--config=run.yaml", "--help"]) == ["--config=run.yaml", "--help"]
    assert as_assignments(["recipe.yaml", "--beta", "0.2"]) == ["recipe.yaml", "beta=0.2"]
