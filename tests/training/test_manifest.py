"""A manifest shows every way in which a checkpoint can be damaged."""

from __future__ import annotations

import json

import pytest

from fastalign.training.manifest import MANIFEST, find_damage, write_manifest


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "inner" / "b.safetensors").write_bytes(b"0123456789")
    write_manifest(tmp_path, 7)
    return tmp_path


def test_a_whole_checkpoint_has_no_damage(checkpoint):
    assert find_damage(checkpoint) is None
    assert json.loads((checkpoint / MANIFEST).read_text())["step"] == 7
    (checkpoint / "note.txt").write_text("by the user")  # a file more is no damage
    assert find_damage(checkpoint) is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: (c / MANIFEST).unlink(), "has no manifest.json: it was not finished"),
        (lambda c: (c / MANIFEST).write_text('{"files": {'), "has a damaged manifest.json"),
        (lambda c: (c / MANIFEST).write_text('{"files": []}'), "has no manifest.json"),
        (lambda c: (c / MANIFEST).write_text('{"files": {"a.json": 3}}'), "a.json has 2 bytes"),
        (lambda c: (c / MANIFEST).write_text('{"files": {"o.pt": {}}}'), "lists o.pt, a pickle, which is never read"),
        (lambda c: (c / "a.json").unlink(), "lacks the file a.json"),
        (lambda c: (c / "a.json").write_text("{} "), "a.json has 3 bytes"),
        (lambda c: (c / "inner" / "b.safetensors").write_bytes(b"0123456780"), "the checksum of inner/b.safetensors"),
    ],
)
def test_damage_is_named(checkpoint, damage, said):
    damage(checkpoint)
    assert said in (find_damage(checkpoint) or "")


def test_sizes_alone_are_compared_where_that_is_wanted(checkpoint):
    (checkpoint / "a.json").write_text("[]")
    assert find_damage(checkpoint, checksums=False) is None
