"""Every recipe that ships with fastalign runs, for two steps and on the tiny model."""

import pytest

from fastalign.cli.configuration import RECIPES, read_recipe, recipes
from fastalign.cli.main import main


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_runs(name, tiny_llama, tokenizer, tmp_path):
    model = tiny_llama()
    model.config.max_position_embeddings = 4096  # a token per byte makes long rows
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    options = read_recipe(name)
    assert options["title"] and (RECIPES / name / "README.md").exists()
    overrides = {
        "model": tmp_path / "model", "output_dir": tmp_path / "run", "max_steps": 2, "max_length": 4096,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "samples": 1, "max_new_tokens": 2,
        "disable_tqdm": "true",
    }  # fmt: skip
    assert main(["train", name, *(f"{key}={value}" for key, value in overrides.items())]) == 0
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "run.json").exists()


def test_there_are_recipes():
    assert "dpo-smollm2" in recipes()
