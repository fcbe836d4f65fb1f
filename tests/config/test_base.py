"""Options of every trainer."""

import re

import pytest
import torch
from transformers import TrainingArguments

from fastalign.config.base import AlignmentConfig
from fastalign.config.distillation import DistillationConfig
from fastalign.config.preference import PreferenceConfig
from fastalign.config.sft import SFTConfig
from fastalign.errors import ConfigError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Configurations make their run folder beside the tests otherwise."""
    monkeypatch.chdir(tmp_path)


def test_defaults_need_no_gpu_and_report_to_nobody():
    config = PreferenceConfig()
    assert config.loss_type == ["dpo"] and config.loss_weights == [1.0]
    assert config.report_to == []
    assert config.remove_unused_columns is False
    assert config.reward_beta == 0.1 and config.loss_options == {}
    assert isinstance(config, TrainingArguments)


def test_every_option_of_ours_has_a_help_text():
    inherited = set(TrainingArguments.__dataclass_fields__)
    for cls in (AlignmentConfig, SFTConfig, PreferenceConfig, DistillationConfig):
        for name, field in cls.__dataclass_fields__.items():
            assert name in inherited or field.metadata.get("help"), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_smoothing_factor": 0.1}, "leave it out"),
        ({"on_truncate": "keepend"}, "did you mean 'keep_end'"),
        ({"on_invalid": "ignore"}, "error, drop"),
        ({"max_length": 1}, "max_length is 1"),
        ({"max_steps": 0}, "give 1 or more, or -1"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"num_train_epochs": -1.0}, "num_train_epochs is -1"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs is nan"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter is True"),
        ({"learning_rate": -1e-6}, "learning_rate is -1e-06"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
    ],
)
def test_bad_values_are_refused_with_a_remedy(options, said):
    with pytest.raises(ConfigError) as error:
        AlignmentConfig(**options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_batches_are_in_page_locked_memory_where_there_is_a_gpu():
    assert AlignmentConfig().dataloader_pin_memory is torch.cuda.is_available()
    assert AlignmentConfig(dataloader_pin_memory=True).dataloader_pin_memory is True
    assert AlignmentConfig(dataloader_pin_memory=False).dataloader_pin_memory is False


def test_importing_the_options_does_not_look_for_a_gpu():
    """A default that asks CUDA would start it in every process that reads the options."""
    assert AlignmentConfig.__dataclass_fields__["dataloader_pin_memory"].default is None


@pytest.mark.parametrize("cls", [AlignmentConfig, SFTConfig, DistillationConfig])
def test_options_are_described_with_the_class(cls):
    described = re.findall(r"^ {8}([a-z_]+): \S", cls.__doc__, re.MULTILINE)
    assert described == list(cls.__annotations__)
