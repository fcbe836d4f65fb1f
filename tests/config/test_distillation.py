"""Options of distillation."""

import pytest

from fastalign.config.distillation import DistillationConfig
from fastalign.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_policy": 1.5}, "on_policy is 1.5"),
        ({"on_policy": 0.5, "top_k": 4}, "without top_k"),
        ({"on_policy": 0.5, "teacher": "a.safetensors"}, "the teacher itself"),
        ({"loss_type": "dft"}, "distillation adds to the NLL"),
        ({"on_policy": 0.5, "completion_only_loss": False}, "on_policy samples the completions"),
        ({"sample_tokens": 0}, "sample_tokens is 0"),
        ({"sample_temperature": 0.0}, "sample_temperature is 0.0"),
    ],
)
def test_bad_options_are_refused(options, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        DistillationConfig(output_dir=str(tmp_path), **options)
