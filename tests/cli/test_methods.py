"""The tables of methods and regularisers."""

from __future__ import annotations

import pytest
from transformers import Trainer, TrainingArguments

from fastalign.cli import methods
from fastalign.config.online import POLICY
from fastalign.config.preference import PreferenceConfig
from fastalign.errors import ConfigError
from fastalign.losses import ALIASES, PAIRWISE, UNPAIRED
from fastalign.regularizers.ewc import L2SP
from fastalign.regularizers.replay import Replay


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_row_names_a_config_and_a_trainer(name):
    row = methods.METHODS[name]
    assert issubclass(methods.load_class(row.config), TrainingArguments)
    assert issubclass(methods.load_class(row.trainer), Trainer)
    assert row.title and row.help


def test_each_method_and_each_loss_is_a_command():
    commands = methods.commands()
    assert set(commands) == {"sft", "distill", "reward", *POLICY, *PAIRWISE, *UNPAIRED, *ALIASES}
    assert (commands["sft"], commands["sigmoid"], commands["kto"]) == ("sft", "preference", "preference")


def test_method_of_a_config(tmp_path):
    assert methods.method_of(PreferenceConfig(output_dir=str(tmp_path))) is methods.METHODS["preference"]
    with pytest.raises(ConfigError, match=r"config is of type dict; expected one of SFTConfig, Dist"):
        methods.method_of({})


def test_regularizers_are_built_from_their_names():
    built = methods.build_regularizers([{"name": "l2_sp", "strength": "1e-2"}, {"name": "replay", "text": "a.txt"}])
    assert [type(one) for one in built] == [L2SP, Replay]
    assert built[0].strength == 0.01
    assert methods.build_regularizers(None) == []


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"name": "ewcc"}, "did you mean 'ewc'"),
        ({"strength": 1}, "name of a regularizer is None"),
        ({"name": "l2_sp", "strenth": 1}, "Unknown option 'strenth' of L2SP; did you mean 'strength'"),
        ({"name": "l2_sp"}, "strength of L2SP is missing"),
        ({"name": "l2_sp", "strength": "much"}, "strength is 'much'; expected float"),
    ],
)
def test_regularizers_that_are_declared_badly_are_refused(mapping, said):
    with pytest.raises(ConfigError, match=said):
        methods.check_regularizers([mapping])
