"""Options of supervised fine-tuning."""

from fastalign.config.base import AlignmentConfig
from fastalign.config.sft import SFTConfig


def test_fine_tuning_learns_faster_than_preferences(tmp_path):
    assert SFTConfig(str(tmp_path)).learning_rate == 2e-5 > AlignmentConfig(str(tmp_path)).learning_rate == 1e-6
