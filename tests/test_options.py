"""Options: declared, converted, checked, suggested."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import pytest

from fastalign.config.preference import PreferenceConfig
from fastalign.config.sft import SFTConfig
from fastalign.errors import ConfigError, InputError
from fastalign.options import check_keys, closest, convert, from_mapping, help_field, nearest, one_of


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Configurations make their run folder beside the tests otherwise."""
    monkeypatch.chdir(tmp_path)


@dataclass
class Options:
    count: int
    names: list[str] = help_field(["a"], "Some names.")
    train: str | None = help_field(None, "A file.", path=True)

    def __post_init__(self):
        if self.count < 0:
            raise InputError("count is below 0")
        if self.count > 9:
            raise ValueError("too\nmany")


def test_fields_carry_their_help_and_whether_they_are_paths():
    _, names, train = fields(Options)
    assert names.metadata == {"help": "Some names.", "path": False}
    assert train.metadata == {"help": "A file.", "path": True}


def test_a_default_list_is_not_shared():
    one, other = Options(1), Options(2)
    one.names.append("b")
    assert other.names == ["a"]


def test_from_mapping_converts_and_checks():
    assert from_mapping(Options, {"count": "3", "train": "x"}) == Options(3, ["a"], "x")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"cuont": 1}, ConfigError, "Unknown option 'cuont' of Options; did you mean 'count'?"),
        ({}, ConfigError, "count of Options is missing; give count"),
        ({"count": 1.5}, ConfigError, "count is 1.5; expected int"),
        ({"count": 1, "names": [3.5]}, ConfigError, "names is 3.5; expected str"),
        ({"count": -1}, InputError, "count is below 0"),  # an error of fastalign stays what it is
        ({"count": 10}, ConfigError, "too many"),  # another library's becomes one sentence
    ],
)
def test_from_mapping_names_what_is_wrong(options, error, said):
    with pytest.raises(error) as raised:
        from_mapping(Options, options)
    assert said in str(raised.value) and "\n" not in str(raised.value)


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
    assert from_mapping(SFTConfig, {}).learning_rate is None  # the trainer picks one by what is trained


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
def test_from_mapping_names_what_is_wrong_in_a_training_configuration(options, said):
    with pytest.raises(ConfigError) as error:
        from_mapping(PreferenceConfig, options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_check_keys_names_the_nearest_known_and_what_is_missing():
    check_keys("X", ["a"], ["a", "b"])
    with pytest.raises(ConfigError, match="Unknown option 'c' of X; choose from a, b"):
        check_keys("X", ["c"], ["a", "b"])
    with pytest.raises(ConfigError, match="b of X is missing; give b"):
        check_keys("X", ["a"], ["a", "b"], ["b"])


def test_one_of():
    one_of("divergence", "jsd", ("jsd", "forward_kl"))
    with pytest.raises(ConfigError, match="divergence is 'jds'; did you mean 'jsd'"):
        one_of("divergence", "jds", ("jsd", "forward_kl"))


def test_convert_keeps_values_that_fit():
    assert convert("x", 3, float | None) == 3.0
    assert convert("x", "3", int) == 3
    assert convert("x", None, int | None) is None
    assert convert("x", "a", str | list[str]) == "a"
    assert convert("x", [1, 2], list[float]) == [1.0, 2.0]


def test_nearest():
    assert nearest("orp", ["orpo", "dpo"]) == "did you mean 'orpo'?"
    assert nearest("zzz", ["orpo", "dpo"]) == "choose from orpo, dpo"


def test_closest():
    assert closest("orp", ["orpo", "dpo"]) == "orpo"
    assert closest("zzz", ["orpo", "dpo"]) is None


@pytest.mark.parametrize(
    ("hint", "value"), [(Literal["a", "b"], "a"), (Literal["a"] | None, None), (str | Literal[False], False)]
)
def test_a_choice_is_converted_as_a_string(hint, value):
    assert convert("option", value, hint) is value


def test_a_choice_takes_no_number():
    with pytest.raises(ConfigError, match="option is 3; expected str"):
        convert("option", 3, Literal["a", "b"])
