"""The options of reward models."""

from __future__ import annotations

import pytest

from fastalign.config.reward import RewardConfig
from fastalign.errors import ConfigError


def test_the_coefficient_of_centring(tmp_path):
    assert RewardConfig(output_dir=str(tmp_path)).center_rewards_coefficient is None
    for value in (-0.1, float("nan")):
        with pytest.raises(ConfigError, match="center_rewards_coefficient"):
            RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=value)
