import math

import pytest
from transformers import TrainingArguments

from fastalign.config.base import AlignmentConfig
from fastalign.config.preference import PreferenceConfig
from fastalign.config.sft import SFTConfig
from fastalign.errors import ConfigError
from fastalign.losses import PAIRWISE, UNPAIRED
from fastalign.options import convert, from_mapping, nearest

SYNC = {"sync_ref_model": True, "precompute_ref_log_probs": False}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_defaults_need_no_gpu_and_report_to_nobody():
    config = PreferenceConfig()
    assert config.loss_type == ["dpo"] and config.loss_weights == [1.0]
    assert config.report_to == []
    assert config.remove_unused_columns is False
    assert config.reward_beta == 0.1 and config.loss_options == {}
    assert isinstance(config, TrainingArguments)


def test_every_option_of_ours_has_a_help_text():
    inherited = {name for name in TrainingArguments.__dataclass_fields__}
    for cls in (AlignmentConfig, SFTConfig, PreferenceConfig):
        for name, field in cls.__dataclass_fields__.items():
            assert name in inherited or field.metadata.get("help"), name


def test_trl_names_of_losses_are_understood():
    assert PreferenceConfig(loss_type="sigmoid").loss_type == ["dpo"]
    assert PreferenceConfig(loss_type=["exo_pair", "sppo_hard"]).loss_type == ["exo", "sppo"]
    assert PreferenceConfig(loss_type="kto").unpaired == "kto"


def test_mixture_as_in_mpo():
    config = PreferenceConfig(loss_type=["dpo", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1])
    assert config.pairwise == {"dpo": 0.8, "bco_pair": 0.2}
    assert config.nll_coefficient == 1.0
    assert config.needs_reference and config.unpaired is None


@pytest.mark.parametrize(
    ("options", "coefficient"),
    [
        ({"loss_type": "dpo"}, 0.0),
        ({"loss_type": "dpo", "nll_weight": 0.3}, 0.3),
        ({"loss_type": "orpo"}, 1.0),
        ({"loss_type": "cpo"}, 1.0),
        ({"loss_type": "orpo", "nll_weight": 0.0}, 0.0),
        ({"loss_type": ["dpo", "sft"], "loss_weights": [1.0, 0.5], "nll_weight": 0.25}, 0.75),
    ],
)
def test_weight_of_the_nll_term(options, coefficient):
    assert PreferenceConfig(**options).nll_coefficient == coefficient


@pytest.mark.parametrize(
    ("loss_type", "needed"), [("dpo", True), ("ipo", True), ("kto", True), ("orpo", False), ("simpo", False)]
)
def test_which_losses_need_a_reference(loss_type, needed):
    assert PreferenceConfig(loss_type=loss_type).needs_reference is needed
    assert PreferenceConfig(loss_type=["sft", "orpo"]).needs_reference is False


def test_options_that_were_set_reach_the_loss():
    config = PreferenceConfig(loss_type="dpo", beta=0.2, label_smoothing=0.1)
    assert config.loss_options == {"beta": 0.2, "label_smoothing": 0.1}
    assert config.reward_beta == 0.2


def test_logged_rewards_have_the_beta_of_the_loss():
    assert PreferenceConfig(loss_type="simpo").reward_beta == 2.0
    assert PreferenceConfig(loss_type=["sft", "simpo", "dpo"]).reward_beta == 2.0
    assert PreferenceConfig(loss_type="simpo", beta=0.5).reward_beta == 0.5
    for name in (*PAIRWISE, *UNPAIRED):
        assert PreferenceConfig(loss_type=name).reward_beta > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "dop"}, "did you mean 'dpo'"),
        ({"loss_type": "sigmoi"}, "did you mean 'sigmoid'"),
        ({"loss_type": "reinforce"}, "choose from dpo"),
        ({"loss_type": []}, "one weight per loss"),
        ({"loss_type": ["dpo", "sft"], "loss_weights": [1.0]}, "one weight per loss"),
        ({"loss_type": ["dpo", "sigmoid"]}, "twice"),
        ({"loss_type": ["dpo", "kto"]}, "stands alone"),
        ({"loss_type": ["sft", "bco"]}, "stands alone"),
        ({"loss_type": "sft"}, "use SFTTrainer"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"beta": math.nan}, "beta is nan"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"loss_type": "ipo_tau", "tau": math.inf}, "tau is inf"),
        ({"loss_type": "kto", "desirable_weight": -1.0}, "-1.0"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "kto", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "dpo", "tau": 0.7}, "tau"),
        ({"loss_type": "kto", "nll_weight": 1.0}, "nll_weight"),
        ({"label_smoothing_factor": 0.1}, "leave it out"),
        ({"nll_over": "prompt"}, "prompt_and_completion"),
        ({"on_truncate": "keepend"}, "did you mean 'keep_end'"),
        ({"on_invalid": "ignore"}, "error, drop"),
        ({"max_length": 1}, "max_length is 1"),
        ({"sync_ref_model": True}, "precompute_ref_log_probs=False"),
        ({"loss_type": "orpo", **SYNC}, "no reference"),
        ({**SYNC, "ref_model_sync_steps": 0}, "ref_model_sync_steps is 0"),
        ({**SYNC, "ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha 1.5"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_a_remedy(options, said):
    with pytest.raises(ConfigError) as error:
        PreferenceConfig(**options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


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
