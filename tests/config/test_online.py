"""The options of online training: what excludes each other, and the defaults of each method."""

from __future__ import annotations

import pytest

from fastalign.config.online import OnlineConfig
from fastalign.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "grpu"}, "grpo"),
        ({"num_generations": 1}, "num_generations is 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"epsilon": 1.5}, "epsilon is 1.5"),
        ({"delta": 0.5}, "delta is 0.5"),
        ({"loss_type": "cispo", "epsilon": 0.2}, "epsilon is 0.2, which cispo does not read"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta is 2.0, which sapo does not read"),
        ({"loss_type": "rloo", "scale_rewards": "group"}, "rloo does not scale"),
        ({"scale_rewards": "row"}, "scale_rewards"),
        ({"kl_target": 3.0}, "kl_target is 3.0, and beta 0"),
        ({"max_length": 100, "max_completion_length": 100}, "no room for a prompt"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha would"),
    ],
)
def test_values_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        OnlineConfig(output_dir=str(tmp_path), **options)


def test_what_is_given_replaces_the_default_of_the_method(tmp_path):
    def policy(**options):
        return OnlineConfig(output_dir=str(tmp_path), **options).policy

    assert policy().epsilon_high == 0.2 and policy(loss_type="dapo").epsilon_high == 0.28
    assert policy(loss_type="dapo", epsilon_high=0.5).epsilon_high == 0.5
    assert (
        policy(loss_type="dr_grpo").scale == "none"
        and policy(loss_type="dr_grpo", scale_rewards="batch").scale == "batch"
    )
    assert policy(loss_type="rloo").leave_one_out
