"""Options with any value: each configuration is made, or refused by an error of ours that is one sentence."""

from __future__ import annotations

import datetime as dt
import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

from comparing import Draw, Wrong
from hypothesis import strategies as st

from fastalign.cli import configuration, table, train
from fastalign.cli.methods import METHODS, REGULARIZERS, build_regularizers, load_class
from fastalign.errors import FastAlignError
from fastalign.options import from_mapping

# What would start processes of its own, or change this one for good.
_LEFT_OUT = {
    "local_rank",
    "ddp_backend",
    "full_determinism",
    "parallelism_config",
    "output_dir",
    "use_cpu",
    "log_level",
}
_WORDS = (
    "",
    "x",
    "no",
    "yes",
    "steps",
    "epoch",
    "none",
    "all",
    "1e-4",
    "nan",
    "true",
    "./nowhere",
    "a/b",
    "dpo",
    "sft",
    "\ud83d\ude00",
)
_PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.integers(-(10**40), 10**40), st.floats(), st.sampled_from(_WORDS),
    st.text(max_size=8), st.just(dt.date(2026, 11, 30)),
)  # fmt: skip
_VALUE = st.one_of(_PLAIN, st.lists(_PLAIN, max_size=3), st.dictionaries(st.text(max_size=5), _PLAIN, max_size=2))


@functools.cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="fuzz-options-")
    os.chdir(folder)
    return folder


def _refused(make: Callable[[], Any]) -> None:
    """Runs it; its refusal goes on if it is one sentence."""
    try:
        make()
    except FastAlignError as error:
        if "\n" in str(error).strip():
            raise Wrong(f"an error of several lines: {error}") from error
        raise


def configurations(draw: Draw) -> None:
    """The options of a method, as YAML or the command line gives them."""
    method = METHODS[draw.one(*METHODS)]
    known = sorted(set(table.of_method(draw.one(*METHODS))) - _LEFT_OUT)
    options = draw.data.draw(st.dictionaries(st.sampled_from(known), _VALUE, max_size=3))
    cls = load_class(method.config)
    _refused(lambda: from_mapping(cls, {**options, "output_dir": _folder(), "use_cpu": True}))


def regularizers(draw: Draw) -> None:
    """Regularisers with any options."""
    name = draw.one(*REGULARIZERS)
    known = [*table.regularizer(name), "strength", "nothing"]
    options = draw.data.draw(st.dictionaries(st.sampled_from(known), _VALUE, max_size=4))
    _folder()
    _refused(lambda: build_regularizers([{"name": draw.one(name, "x", ""), **options}]))


def typed_words(draw: Draw) -> None:
    """Words of the command line, and the checks before anything heavy is imported."""
    _folder()
    known = [
        *sorted(set(table.of_method("preference")) - _LEFT_OUT),
        "model",
        "train",
        "eval",
        "title",
        "lora_rank",
        "adapter",
    ]
    words = draw.data.draw(
        st.lists(
            st.one_of(
                st.builds(
                    "{}={}".format,
                    st.sampled_from(known),
                    st.one_of(st.text(max_size=10), st.sampled_from(_WORDS), _NUMBERS),
                ),
                st.text(max_size=10),
            ),
            max_size=4,
        )
    )
    _refused(
        lambda: train.check(
            {"method": draw.one("dpo", "kto", "sft", "distill", "x", None), **configuration.read_arguments(words)}
        )
    )


def yaml_files(draw: Draw) -> None:
    """A configuration file of any bytes, or of any mapping."""
    import yaml

    path = os.path.join(_folder(), "run.yaml")  # noqa: PTH118 - as a user types it
    some = yaml.safe_dump(
        draw.data.draw(st.dictionaries(st.sampled_from(["model", "train", "regularizers", "beta"]), _VALUE))
    )
    content = draw.data.draw(st.one_of(st.binary(max_size=40), st.just(some.encode(errors="replace"))))
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(content)
    _refused(lambda: train.check({"method": "dpo", **configuration.read_recipe(path)}))


_NUMBERS = st.one_of(
    st.integers(-3, 10**20),
    st.floats(),
    st.sampled_from([".inf", ".nan", "1e400", "[1, 2]", "{a: 1}", "{", "2026-11-30"]),
)
CHECKS = {f.__name__: f for f in (configurations, regularizers, typed_words, yaml_files)}
