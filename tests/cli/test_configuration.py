"""Options as users give them: recipes, YAML files, and words of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastalign.cli import configuration
from fastalign.errors import ConfigError


def written(folder: Path, options: dict) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    return folder / "run.yaml"


@pytest.mark.parametrize("name", ["model", "train", "eval", "teacher", "cache_dir", "ref_cache_dir"])
def test_declared_paths_are_resolved_from_the_folder_of_the_file(tmp_path, name):
    path = written(tmp_path, {name: "../there"})
    assert configuration.read_yaml(path) == {name: str(tmp_path.parent / "there")}
    path = written(tmp_path, {name: "there"})
    assert configuration.read_yaml(path) == {name: "there"}  # from the working directory, or the name of a model


@pytest.mark.parametrize(
    ("regularizer", "name"),
    [("ewc", "fisher"), ("replay", "text"), ("distillation", "teacher"), ("distillation", "cache_dir")],
)
def test_paths_of_regularizers_are_resolved_too(tmp_path, regularizer, name):
    path = written(tmp_path, {"regularizers": [{"name": regularizer, name: "./there"}]})
    assert configuration.read_yaml(path)["regularizers"] == [{"name": regularizer, name: str(tmp_path / "there")}]


def test_each_path_of_a_list_is_resolved(tmp_path):
    path = written(tmp_path, {"regularizers": [{"name": "ewc", "fisher": ["./a", "b", 3]}]})
    assert configuration.read_yaml(path)["regularizers"][0]["fisher"] == [str(tmp_path / "a"), "b", 3]


def test_each_path_of_several_sources_is_resolved(tmp_path):
    path = written(tmp_path, {"train": [{"path": "./a", "weight": 2}, "./b"], "eval": {"easy": "../c"}})
    options = configuration.read_yaml(path)
    assert options["train"] == [{"path": str(tmp_path / "a"), "weight": 2}, str(tmp_path / "b")]
    assert options["eval"] == {"easy": str(tmp_path.parent / "c")}


def test_what_is_no_path_is_left_as_it_is(tmp_path):
    options = {"title": "./mine", "output_dir": "./runs", "max_steps": 3, "regularizers": ["./a", {"text": "./b"}]}
    assert configuration.read_yaml(written(tmp_path, options)) == options


def test_recipes_are_found_by_name_and_by_path(tmp_path):
    assert "dpo-smollm2" in configuration.recipes()
    recipe = configuration.read_recipe("dpo-smollm2")
    assert recipe["method"] == "dpo" and Path(recipe["train"]).is_file()
    assert configuration.read_recipe(str(written(tmp_path, {"beta": 1}))) == {"beta": 1}
    with pytest.raises(ConfigError, match="did you mean 'dpo-smollm2'"):
        configuration.read_recipe("dpo-smolm2")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- model\n- train\n", "must be a mapping"),
        (b"", "must be a mapping"),
        (b"1: 2\n", "must be a mapping"),
        (b"model: [half\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, content, said):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        configuration.read_yaml(tmp_path / "run.yaml")
    assert "\n" not in str(error.value)


def test_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        configuration.read_yaml(tmp_path / "nowhere.yaml")


def test_words_of_the_command_line_are_read_as_yaml():
    words = ["beta=0.1", "title=a=b", "eval=", "loss_type=[dpo, sft]", "use_cpu=true"]
    assert configuration.read_arguments(words) == {
        "beta": 0.1, "title": "a=b", "eval": None, "loss_type": ["dpo", "sft"], "use_cpu": True,
    }  # fmt: skip


@pytest.mark.parametrize(("word", "said"), [("beta", "not of the form key=value"), ("title=[half", "quote the value")])
def test_bad_words_are_one_sentence(word, said):
    with pytest.raises(ConfigError, match=said):
        configuration.read_arguments([word])
