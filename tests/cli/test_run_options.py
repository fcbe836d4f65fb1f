"""The options of a run that are checked without its method."""

from __future__ import annotations

import pytest

from fastalign.cli.run_options import RunOptions, paths_of
from fastalign.errors import ConfigError


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"model": None}, "model is missing"),
        ({"train": ""}, "train is missing"),
        ({"adapter": "join"}, "adapter"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"samples": -2}, "samples is -2"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"quantization": "nf5"}, "quantization is 'nf5'"),
        ({"double_quantization": True}, "double_quantization .* not 'none'"),
        ({"quantize_head": True}, "quantize_head is True and quantization 'none'"),
        ({"quantization": "nf4", "lora_rank": 0}, "quantization is 'nf4' and lora_rank 0"),
        ({"regularizers": [{"name": "ewcc"}]}, "did you mean 'ewc'"),
    ],
)
def test_options_are_checked(over, said):
    with pytest.raises(ConfigError, match=said):
        RunOptions(**{"model": "m", "train": "rows.jsonl", **over})


@pytest.mark.parametrize(
    ("source", "paths"),
    [
        (None, []),
        ("a", ["a"]),
        ({"path": "a"}, ["a"]),
        ([{"path": "a", "weight": 2}, "b"], ["a", "b"]),
        ({"easy": "a", "hard": [{"path": "b"}]}, ["a", "b"]),
    ],
)
def test_the_paths_of_sources_of_every_form(source, paths):
    assert paths_of(source) == paths


def test_sources_are_checked():
    with pytest.raises(ConfigError, match="Unknown option 'weigth' of a source of rows; did you mean 'weight'"):
        paths_of([{"path": "a", "weigth": 2}])
    with pytest.raises(ConfigError, match="3 names no rows"):
        paths_of([3])
