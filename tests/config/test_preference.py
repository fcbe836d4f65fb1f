"""Options of preference optimisation."""

import math

import pytest

from fastalign.config.preference import PreferenceConfig
from fastalign.errors import ConfigError
from fastalign.losses import PAIRWISE, UNPAIRED

SYNC = {"sync_ref_model": True, "precompute_ref_log_probs": False}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Configurations make their run folder beside the tests otherwise."""
    monkeypatch.chdir(tmp_path)


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
        ({"loss_type": "sft", "beta": 0.2}, "sft has no such option"),
        ({"loss_type": "sft", "f_divergence_type": "forward_kl"}, "go with dpo, dpo_norm"),
        ({"f_divergence_type": "kl"}, "choose from reverse_kl"),
        ({"loss_type": ["dpo", "nca"], "f_divergence_type": "js_divergence"}, "with loss_type ['nca']"),
        ({"f_alpha_divergence_coef": 0.3}, "only f_divergence_type=alpha_divergence"),
        ({"loss_type": "kto", "f_divergence_type": "forward_kl"}, "only a loss over pairs"),
        ({"loss_type": "kto", "ld_alpha": 0.5}, "only a loss over pairs"),
        ({"loss_type": "bco", "use_weighting": True}, "only a loss over pairs"),
        ({"loss_type": "bco", "desirable_weight": 2.0}, "only kto or apo_zero_unpaired"),
        ({"loss_type": "aot", "use_weighting": True}, "sorts the batch"),
        ({"ld_alpha": 1.5}, "ld_alpha is 1.5"),
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
        ({"nll_over": "prompt"}, "prompt_and_completion"),
        ({"sync_ref_model": True}, "precompute_ref_log_probs=False"),
        ({"loss_type": "orpo", **SYNC}, "no reference"),
        ({**SYNC, "ref_model_sync_steps": 0}, "ref_model_sync_steps is 0"),
        ({**SYNC, "ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha is 1.5"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_a_remedy(options, said):
    with pytest.raises(ConfigError) as error:
        PreferenceConfig(**options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_sft_alone_needs_no_reference():
    config = PreferenceConfig(loss_type="sft")
    assert not config.needs_reference and config.nll_coefficient == 1.0 and config.reward_beta == 0.1
