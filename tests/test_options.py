"""Options as dataclass fields: converted from plain values, checked, suggested."""

import pytest

from fastalign.config.preference import PreferenceConfig
from fastalign.config.sft import SFTConfig
from fastalign.errors import ConfigError
from fastalign.options import convert, from_mapping, nearest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Configurations make their run folder beside the tests otherwise."""
    monkeypatch.chdir(tmp_path)


def test_from_mapping_converts_what_yaml_and_shells_write():
    options = {
        "learning_rate": "5e-5",  # a string to YAML 1.1
        "beta": 1,
        "max_length": "64",
        "num_train_epochs": 2,
        "loss_type": ["dpo", "sft"],
        "loss_weights": [1, "0.5"],
        "share_prompts": False,
        "ref_cache_dir": None,
        "lr_scheduler_type": "cosine",
    }
    config = from_mapping(PreferenceConfig, options)
    assert config.learning_rate == 5e-5
    assert config.beta == 1.0 and isinstance(config.beta, float)
    assert config.max_length == 64 and isinstance(config.max_length, int)
    assert config.loss_weights == [1.0, 0.5]
    assert config.lr_scheduler_type == "cosine"
    assert from_mapping(SFTConfig, {}).learning_rate == 2e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"betta": 0.1}, "Unknown option 'betta' of PreferenceConfig; did you mean 'beta'"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"beta": "big"}, "beta is 'big'; expected float"),
        ({"beta": True}, "beta is True"),
        ({"beta": [0.1]}, "beta is [0.1]"),
        ({"max_length": True}, "max_length is True; expected int"),
        ({"max_length": 12.5}, "max_length is 12.5; expected int"),
        ({"max_length": "12.5"}, "expected int"),
        ({"share_prompts": "yes"}, "share_prompts is 'yes'; expected bool"),
        ({"share_prompts": 1}, "share_prompts is 1"),
        ({"share_prompts": None}, "share_prompts is None"),
        ({"loss_type": 3}, "loss_type is 3; expected str or list"),
        ({"loss_type": ["dpo", 3]}, "3"),
        ({"loss_weights": ["a"]}, "'a'"),
        ({"lr_scheduler_type": "cosin"}, "cosin"),
        ({"num_train_epochs": "many"}, "num_train_epochs is 'many'"),
        ({"save_strategy": "sometimes"}, "sometimes"),
    ],
)
def test_from_mapping_names_what_is_wrong(options, said):
    with pytest.raises(ConfigError) as error:
        from_mapping(PreferenceConfig, options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_convert_keeps_values_that_fit():
    assert convert("x", 3, float | None) == 3.0
    assert convert("x", "3", int) == 3
    assert convert("x", None, int | None) is None
    assert convert("x", "a", str | list[str]) == "a"
    assert convert("x", [1, 2], list[float]) == [1.0, 2.0]


def test_nearest():
    assert nearest("orp", ["orpo", "dpo"]) == "did you mean 'orpo'?"
    assert nearest("zzz", ["orpo", "dpo"]) == "choose from orpo, dpo"
