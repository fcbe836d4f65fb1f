"""Nested state comes back as it was, without a pickle."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from fastalign.errors import ConfigError
from fastalign.training.state_files import load_state, save_state


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_everything_comes_back_with_its_type_and_bits(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(3, 2).t()}, 7: {}},
        "views": [shared[:3], shared[3:], torch.zeros(0), torch.ones(1).expand(4)],
        "bfloat16": torch.randn(3).bfloat16(), "numbers": (1, 1.1e-17, True, None, "text", 2**70),
        "nan": [math.nan, math.inf, -math.inf], "array": np.arange(3, dtype=np.uint32), "scalar": np.float64(0.1),
        "$tensor": "a key of this name", "empty": {}, "betas": (0.9, 0.999),
    }  # fmt: skip
    save_state(tmp_path, "optimizer", state)
    back = load_state(tmp_path, "optimizer")
    state["scalar"] = 0.1  # numpy's scalars become Python's
    assert same(back, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optimizer.json", "optimizer.safetensors"]


def test_random_states_come_back(tmp_path):
    state = [random.getstate(), np.random.get_state(), torch.get_rng_state()]  # noqa: NPY002  # the global one
    save_state(tmp_path, "random", state)
    assert same(load_state(tmp_path, "random"), state)


def test_no_files_are_no_state(tmp_path):
    assert load_state(tmp_path, "optimizer") is None


def test_an_object_of_another_kind_is_refused_by_its_place(tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer.groups\[1\].fn is of type object"):
        save_state(tmp_path, "optimizer", {"groups": [{}, {"fn": object()}]})
