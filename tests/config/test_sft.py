"""Options of supervised fine-tuning."""

from fastalign.config.base import AlignmentConfig
from fastalign.config.sft import SFTConfig


def test_fine_tuning_learns_faster_than_preferences(tmp_path):
    assert SFTConfig.adapter_rate == 2e-4 > AlignmentConfig.adapter_rate == 1e-4
    assert SFTConfig.full_rate == 1e-5 > AlignmentConfig.full_rate == 1e-6
    assert SFTConfig(str(tmp_path)).learning_rate is None
