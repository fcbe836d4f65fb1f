"""Values that are written while they are computed."""

import numpy as np

from fastalign.data import keyed_log
from fastalign.data.keyed_log import KeyedLog
from fastalign.files import write_keyed


def values(*numbers):
    return {bytes([n] * 16): np.full(n, n, np.float32) for n in numbers}


def test_what_was_added_is_there_for_the_next_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(keyed_log, "WRITE_SECONDS", 0)
    path = tmp_path / "weights.safetensors"
    log = KeyedLog(path, "logprobs")
    log.add(values(1, 2))
    log.add(values(3))
    other = KeyedLog(path, "logprobs")
    assert {key[0]: value.tolist() for key, value in other.read().items()} == {1: [1], 2: [2, 2], 3: [3, 3, 3]}
    found = other.read()
    write_keyed(path, list(found), {"logprobs": list(found.values())})
    other.clear()
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"]
    assert KeyedLog(path, "logprobs").read().keys() == values(1, 2, 3).keys()


def test_files_are_some_seconds_apart_and_damaged_ones_left_out(tmp_path, monkeypatch, caplog):
    log = KeyedLog(tmp_path / "weights.safetensors", "logprobs")
    log.add(values(1))
    assert not log.folder.exists()
    monkeypatch.setattr(keyed_log, "WRITE_SECONDS", 0)
    log.add(values(2))
    (part,) = log.folder.iterdir()
    (log.folder / "0.safetensors").write_bytes(part.read_bytes()[:30])
    with caplog.at_level("WARNING", "fastalign"):
        assert log.read().keys() == values(1, 2).keys()
    assert "computed again" in caplog.text


def test_a_full_disk_stops_no_pass(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(keyed_log, "WRITE_SECONDS", 0)
    log = KeyedLog(tmp_path / "weights.safetensors", "logprobs")
    log.folder.write_text("")  # where the folder should be
    log.folder = log.folder / "below"
    with caplog.at_level("WARNING", "fastalign"):
        log.add(values(1))
        log.add(values(2))
    assert caplog.text.count("cannot be written") == 1
