"""Every option of transformers works here, is refused with a sentence, or has no meaning."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from transformers import Trainer, TrainingArguments

from fastalign.config import supported
from fastalign.config.base import AlignmentConfig
from fastalign.errors import ConfigError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_option_stands_in_one_list():
    lists = [set(supported.WORKS), set(supported.REFUSED), set(supported.NO_MEANING)]
    options = {field.name for field in dataclasses.fields(TrainingArguments)}
    listed = set.union(*lists)
    assert listed == options, f"missing: {sorted(options - listed)}, gone: {sorted(listed - options)}"
    assert sum(map(len, lists)) == len(options)


def test_every_argument_of_the_trainer_stands_in_one_list():
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert not supported.ARGUMENTS_THAT_WORK & supported.ARGUMENTS_REFUSED.keys()
    assert arguments <= supported.ARGUMENTS_THAT_WORK | supported.ARGUMENTS_REFUSED.keys()
    assert arguments >= supported.ARGUMENTS_THAT_WORK


OTHER = {
    "include_num_input_tokens_seen": "all", "include_for_metrics": ["loss"], "label_names": ["labels"],
    "length_column_name": "tokens", "liger_kernel_config": {"rope": True}, "eval_accumulation_steps": 1,
    "deepspeed": "ds.json", "parallelism_config": object(), "label_smoothing_factor": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", supported.REFUSED)
def test_what_would_do_nothing_is_refused(name):
    default = AlignmentConfig.__dataclass_fields__[name].default
    value = OTHER.get(name, not default)
    with pytest.raises(ConfigError, match=f"^{name} is ") as error:
        AlignmentConfig(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "packed rows have no padding"),
        ({"fsdp": "full_shard"}, "fsdp is 'full_shard', but there is one process"),
        ({"fp16": True, "use_cpu": True}, "fp16 is True, but training runs on a CPU"),
    ],
)
def test_what_cannot_work_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        AlignmentConfig(**options)


def test_arguments_of_other_trainers_are_answered():
    supported.check_arguments({"optimizers": (None, None), "compute_metrics": None})
    for name in supported.ARGUMENTS_REFUSED:
        with pytest.raises(ConfigError, match=f"^{name} is not supported: "):
            supported.check_arguments({name: object()})
    with pytest.raises(ConfigError, match="no argument 'optimiser'; did you mean 'optimizers'"):
        supported.check_arguments({"optimiser": 1})
