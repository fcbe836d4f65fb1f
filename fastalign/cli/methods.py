"""The table of training methods and the table of regularisers; nothing here imports torch.

Classes stand in the tables as `module:name`, so that a command imports only what it runs. A new trainer is a row of
METHODS, a new regulariser a row of REGULARIZERS.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastalign.cli import table
from fastalign.errors import ConfigError
from fastalign.options import check_keys, from_mapping, one_of


class Method(NamedTuple):
    """One row of METHODS.

    Attributes:
        title: The method's name in reports.
        help: The sentence that `fastalign --help` shows.
        config: `module:class` of its options.
        trainer: `module:class` of its trainer.
        losses: Whether each preference loss is a command, which sets loss_type.
        names: Commands that set loss_type, where they are not the row's own name.
        answers: Whether the trained model writes answers, which are compared before and after training.
    """

    title: str
    help: str
    config: str
    trainer: str
    losses: bool = False
    answers: bool = True
    names: tuple[str, ...] = ()


METHODS = {
    "sft": Method(
        title="sft",
        help="train on completions, chats or plain text",
        config="fastalign.config.sft:SFTConfig",
        trainer="fastalign.training.sft:SFTTrainer",
    ),
    "distill": Method(
        title="distillation",
        help="train on a teacher's probabilities",
        config="fastalign.config.distillation:DistillationConfig",
        trainer="fastalign.training.distillation:DistillationTrainer",
    ),
    "preference": Method(
        title="preference",
        help="train on preferences",
        config="fastalign.config.preference:PreferenceConfig",
        trainer="fastalign.training.preference:PreferenceTrainer",
        losses=True,
    ),
    "reward": Method(
        title="reward model",
        help="train a reward model on pairs",
        config="fastalign.config.reward:RewardConfig",
        trainer="fastalign.training.reward:RewardTrainer",
        answers=False,
    ),
    "online": Method(
        title="online",
        help="train on rewards of the model's own answers",
        config="fastalign.config.online:OnlineConfig",
        trainer="fastalign.training.online:OnlineTrainer",
        names=("grpo", "dapo", "bnpo", "dr_grpo", "gspo", "luspo", "cispo", "sapo", "rloo"),
    ),
}

# Names in a configuration file: `regularizers: [{name: ewc, strength: 100, fisher: ./fisher.safetensors}]`.
REGULARIZERS = {
    "ewc": "fastalign.regularizers.ewc:EWC",
    "l2_sp": "fastalign.regularizers.ewc:L2SP",
    "kl_to_start": "fastalign.regularizers.kl:KLToStart",
    "distillation": "fastalign.regularizers.distillation:Distillation",
    "replay": "fastalign.regularizers.replay:Replay",
    "layerwise": "fastalign.regularizers.layerwise:LayerWise",
}


def load_class(name: str) -> Any:
    """The class that a row calls `module:name`."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def commands() -> dict[str, str]:
    """Command -> its row in METHODS.

    Commands are sft, distill, reward, every preference loss by its name and by TRL's, and every online method.
    """
    found = {}
    for name, method in METHODS.items():
        names = [*table.losses(), *table.aliases()] if method.losses else method.names or [name]
        found.update(dict.fromkeys(names, name))
    return found


def method_of(config: object) -> Method:
    """The row of METHODS whose options are `config`.

    Raises:
        ConfigError: No row has options of that class.
    """
    for method in METHODS.values():
        if load_class(method.config) is type(config):
            return method
    known = ", ".join(method.config.partition(":")[2] for method in METHODS.values())
    raise ConfigError(f"config is of type {type(config).__name__}; expected one of {known}.")


def check_regularizers(options: Sequence[Mapping[str, Any]] | None) -> None:
    """Checks the names, options and types of regularisers as a configuration file gives them, without importing them.

    Raises:
        ConfigError: A regulariser or an option is unknown, a required option is missing, or a value has another type.
    """
    for mapping in options or []:
        one_of("name of a regularizer", mapping.get("name"), REGULARIZERS)
        given = {key: value for key, value in mapping.items() if key != "name"}
        known = table.regularizer(mapping["name"])
        needed = [name for name, option in known.items() if "default" not in option]
        check_keys(REGULARIZERS[mapping["name"]].partition(":")[2], given, known, needed)
        table.check_types(given, known)


def build_regularizers(options: Sequence[Mapping[str, Any]] | None) -> list:
    """Regularisers from mappings of their `name` and options.

    Raises:
        ConfigError: As `check_regularizers`, or a regulariser refuses a value.
    """
    check_regularizers(options)
    return [
        from_mapping(load_class(REGULARIZERS[mapping["name"]]), {k: v for k, v in mapping.items() if k != "name"})
        for mapping in options or []
    ]
