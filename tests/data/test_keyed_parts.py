"""With one process; two of them are in tests/training/test_two_processes.py."""

import numpy as np

from fastalign.data.keyed_parts import own_part, write_parts
from fastalign.files import KeyedTensors


def test_one_process_has_all_batches_and_writes_the_file(tmp_path):
    assert own_part([[0, 1], [2]]) == [[0, 1], [2]]
    keys = [b"a" * 16, b"b" * 16]
    write_parts(tmp_path / "file", keys, {"x": [np.arange(2), np.arange(3)]}, {"of": "test"})
    stored = KeyedTensors(tmp_path / "file", ["x"])
    assert stored.metadata == {"of": "test"}
    assert {key: values.tolist() for key, values in stored.read_all("x").items()} == {
        keys[0]: [0, 1],
        keys[1]: [0, 1, 2],
    }
