"""Options of supervised fine-tuning."""

import pytest

from fastalign.config.base import AlignmentConfig
from fastalign.config.sft import SFTConfig
from fastalign.errors import ConfigError


def test_fine_tuning_learns_faster_than_preferences(tmp_path):
    assert SFTConfig.adapter_rate == 2e-4 > AlignmentConfig.adapter_rate == 1e-4
    assert SFTConfig.full_rate == 1e-5 > AlignmentConfig.full_rate == 1e-6
    assert SFTConfig(str(tmp_path)).learning_rate is None


def test_an_unknown_loss_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="loss_type is 'dtf'; did you mean 'dft'"):
        SFTConfig(str(tmp_path), loss_type="dtf")
