"""The table of options, which stands in for classes that take seconds to import."""

from __future__ import annotations

import enum
import json
import re
import types
import typing
from dataclasses import MISSING, Field, fields
from importlib.metadata import version
from typing import Any

import pytest
from transformers import TrainingArguments

from fastalign.cli import methods, table
from fastalign.errors import ConfigError
from fastalign.losses import ALIASES, PAIRWISE, UNPAIRED
from fastalign.options import is_choice

INHERITED = {f.name: f for f in fields(TrainingArguments)}


def type_text(hint: Any) -> str:
    """A type as the table writes it: `list[str] | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(type_text, typing.get_args(hint)))
    if is_choice(hint):
        return "str"
    if isinstance(hint, list):  # the arguments of a Callable
        return f"[{', '.join(map(type_text, hint))}]"
    if arguments := typing.get_args(hint):
        origin = typing.get_origin(hint)
        name = origin.__name__ if isinstance(origin, type) else str(origin).removeprefix("typing.")
        return f"{name}[{', '.join(map(type_text, arguments))}]"
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")


def described(field: Field, hint: Any) -> dict[str, Any]:
    option: dict[str, Any] = {"type": type_text(hint)}
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is not MISSING:
        option["default"] = default.value if isinstance(default, enum.Enum) else default
    if text := " ".join((field.metadata.get("help") or "").split()):
        # Of transformers the first sentence: some of its help texts are paragraphs.
        option["help"] = re.split(r"(?<=\.) ", text)[0] if INHERITED.get(field.name) is field else text
    if field.metadata.get("path"):
        option["path"] = True
    return option


def options_of(cls: type, without: dict[str, Field] | None = None) -> dict[str, dict]:
    """Every option of a dataclass that is not inherited as it is."""
    hints, without = typing.get_type_hints(cls), without or {}
    changed = [f for f in fields(cls) if f.init and without.get(f.name) is not f]
    return {f.name: described(f, hints[f.name]) for f in changed}


def lines(section: dict[str, dict], indent: str) -> str:
    return ",\n".join(f"{indent}{json.dumps(name)}: {json.dumps(option)}" for name, option in section.items())


def table_text(content: dict[str, Any]) -> str:
    """The table as JSON with one option per line, so that a difference is easy to read."""
    head = {"transformers": content["transformers"], "losses": content["losses"], "aliases": content["aliases"]}
    parts = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    parts.append(f'  "inherited": {{\n{lines(content["inherited"], "    ")}\n  }}')
    for group in ("methods", "regularizers"):
        sections = [f"    {json.dumps(k)}: {{\n{lines(v, '      ')}\n    }}" for k, v in content[group].items()]
        parts.append(f'  "{group}": {{\n' + ",\n".join(sections) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def test_the_table_is_what_the_installed_classes_have(generated):
    content = {
        "transformers": version("transformers"),
        "losses": [*PAIRWISE, *UNPAIRED],
        "aliases": list(ALIASES),
        "inherited": options_of(TrainingArguments),
        "methods": {
            name: options_of(methods.load_class(row.config), INHERITED) for name, row in methods.METHODS.items()
        },
        "regularizers": {name: options_of(methods.load_class(cls)) for name, cls in methods.REGULARIZERS.items()},
    }
    held = json.loads(table.FILE.read_text(encoding="utf-8"))
    if {**held, "transformers": ""} == {**content, "transformers": ""}:
        content["transformers"] = held["transformers"]  # another release with the same options
    generated(table.FILE, table_text(content))


def test_what_the_table_says():
    assert {"dpo", "simpo", "kto"} <= set(table.losses()) and "sigmoid" in table.aliases()
    assert "num_train_epochs" in table.inherited() and "beta" not in table.inherited()
    assert "beta" in table.own("preference") and "beta" not in table.of_method("sft")
    assert table.of_method("sft")["learning_rate"]["default"] is None  # over the inherited one
    assert table.of_method("sft")["seed"]["default"] == 42


def test_which_options_are_paths():
    assert {"teacher", "cache_dir"} <= table.paths(table.own("distill"))
    assert "ref_cache_dir" in table.paths(table.own("preference"))
    found = {name: table.paths(table.regularizer(name)) for name in methods.REGULARIZERS}
    assert (found["ewc"], found["replay"], found["l2_sp"]) == ({"fisher"}, {"text"}, set())
    assert found["distillation"] == {"teacher", "cache_dir"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"beta": "high"}, "beta is 'high'; expected float"),
        ({"max_steps": 1.5}, "max_steps is 1.5; expected int"),
        ({"loss_weights": ["a"]}, "'a'"),
        ({"share_prompts": None}, "share_prompts is None"),
    ],
)
def test_values_of_another_type_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        table.check_types(values, table.of_method("preference"))


def test_values_that_fit_and_types_that_the_table_does_not_check_pass():
    fitting = {"beta": "1e-1", "max_steps": "3", "loss_weights": [1, 2.0], "loss_type": "dpo", "max_length": None}
    table.check_types({**fitting, "lr_scheduler_type": 3, "unknown": 3}, table.of_method("preference"))
