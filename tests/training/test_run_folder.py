"""Checkpoints on the disk: what a killed process leaves, rotation, and a folder that is used again."""

from __future__ import annotations

import os

import pytest

from fastalign.errors import ConfigError, DataError
from fastalign.training import run_folder
from fastalign.training.manifest import find_damage


def save(run, step, content="x"):
    aside = run_folder.start_checkpoint(run, step)
    (aside / "weights").write_text(content)
    return run_folder.finish_checkpoint(aside)


def names(run):
    return sorted(path.name for path in run.iterdir())


def content(run, step):
    return (run / f"checkpoint-{step}" / "weights").read_text()


class Killed(BaseException):
    pass


SYSTEM_CALLS = ["fsync", "rename", "replace", "rmdir", "unlink"]


def test_whenever_a_save_is_killed_one_whole_checkpoint_is_found(tmp_path, monkeypatch):
    """The process is stopped before each of its calls of the system that changes the disk, one after another."""
    works = {name: getattr(os, name) for name in SYSTEM_CALLS}
    for number in range(1000):
        run, calls = tmp_path / str(number), []
        run.mkdir()
        save(run, 1, "one")
        save(run, 2, "old two")

        def counted(name, number=number, calls=calls):
            def call(*args, **kwargs):
                calls.append(name)
                if len(calls) > number:
                    raise Killed
                return works[name](*args, **kwargs)

            return call

        for name in works:
            monkeypatch.setattr(os, name, counted(name))
        monkeypatch.setattr(run_folder.shutil, "rmtree", _rmtree(works, counted("rmtree"), number, calls))
        killed = False
        try:
            save(run, 2, "new two")
            run_folder.rotate(run, 1, None)
        except Killed:
            killed = True
        monkeypatch.undo()
        run_folder.recover(run)
        found = run_folder.find_checkpoint(run, "last")
        assert found is not None and found.name == "checkpoint-2", (number, calls)
        assert content(run, 2) in ("old two", "new two")
        assert not [name for name in names(run) if name.startswith(".")], (number, names(run))
        if not killed:
            assert names(run) == ["checkpoint-2"] and content(run, 2) == "new two"
            assert number > 5
            return
    pytest.fail("it never ended")


def _rmtree(works, counted, number, calls):
    """`shutil.rmtree` that dies in the middle when its turn comes, with some of the files deleted."""
    import shutil

    real = shutil.rmtree

    def rmtree(path, ignore_errors=False):
        calls.append("rmtree")
        if len(calls) > number:
            for file in sorted(path.rglob("*"))[:1] if path.exists() else []:
                works["unlink"](file)
            raise Killed
        before = {name: getattr(os, name) for name in works}
        for name, function in works.items():
            setattr(os, name, function)
        try:
            real(path, ignore_errors=ignore_errors)
        finally:
            for name, function in before.items():
                setattr(os, name, function)

    return rmtree


def test_a_checkpoint_that_only_lacks_its_name_gets_it(tmp_path):
    final = save(tmp_path, 3)
    final.rename(tmp_path / ".saving-checkpoint-3")
    (tmp_path / ".saving-checkpoint-4").mkdir()
    (tmp_path / ".deleting-checkpoint-1").mkdir()
    (tmp_path / ".saving-model").mkdir()
    run_folder.recover(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"] and find_damage(final) is None


def test_rotation_counts_whole_ones_and_keeps_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    for step in (5, 6):
        (tmp_path / f"checkpoint-{step}" / "weights").unlink()
    run_folder.rotate(tmp_path, 2, tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4", "checkpoint-5", "checkpoint-6"]
    run_folder.rotate(tmp_path, None, None)
    run_folder.rotate(tmp_path, 1, None)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (10, 9, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [path.name for path in run_folder.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (9, 10, 100)]


@pytest.mark.parametrize("given", [True, "last", "true", "True"])
def test_last_is_the_newest_whole_one(tmp_path, given, caplog):
    assert run_folder.find_checkpoint(tmp_path, given) is None and "from the beginning" in caplog.text
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert run_folder.find_checkpoint(tmp_path, given) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / "weights").write_text("y")
    assert run_folder.find_checkpoint(tmp_path, given) == tmp_path / "checkpoint-1"
    assert "the checksum of weights is not that of the manifest; training goes on from checkpoint-1" in caplog.text
    assert run_folder.find_checkpoint(tmp_path, False) is run_folder.find_checkpoint(tmp_path, None) is None


def test_later_checkpoints_are_set_aside(tmp_path):
    for _ in range(2):
        for step in (1, 2, 3):
            save(tmp_path, step)
        run_folder.set_aside_later(tmp_path, tmp_path / "checkpoint-2")
    assert names(tmp_path) == [
        "checkpoint-1", "checkpoint-2", "set-aside-checkpoint-3", "set-aside-checkpoint-3-2"
    ]  # fmt: skip
    run_folder.set_aside_later(tmp_path, tmp_path / "elsewhere" / "checkpoint-1")
    assert len(names(tmp_path)) == 4


@pytest.mark.parametrize("left", ["metrics.jsonl", "adapter_model.safetensors", "summary.json", "checkpoint-1"])
def test_a_folder_with_a_run_is_refused(tmp_path, left):
    save(tmp_path, 1) if left.startswith("checkpoint") else (tmp_path / left).write_text("{}")
    (tmp_path / "notes.txt").write_text("by the user")
    with pytest.raises(ConfigError, match=f"holds a run already .{left}"):
        run_folder.check_folder(tmp_path, None, overwrite=False, writes=True)
    run_folder.check_folder(tmp_path, None, overwrite=True, writes=True)
    run_folder.check_folder(tmp_path, "last", overwrite=False, writes=True)
    run_folder.clear(tmp_path)
    assert names(tmp_path) == ["notes.txt"]
    run_folder.check_folder(tmp_path, None, overwrite=False, writes=True)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=f"output_dir '{folder}' cannot be written"):
            run_folder.check_folder(folder, None, overwrite=False, writes=True)
    with pytest.raises(ConfigError, match="which is no folder"):
        run_folder.check_folder(tmp_path, "checkpoint-9", overwrite=False, writes=True)
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "weights").unlink()
    with pytest.raises(DataError, match="is whole"):
        run_folder.check_folder(tmp_path, "last", overwrite=False, writes=True)


def test_a_saved_model_replaces_another_of_more_files(tmp_path):
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (tmp_path / name).write_text("old")
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "notes.txt").write_text("by the user")
    aside = run_folder.save_aside(tmp_path)
    assert run_folder.is_aside(aside) and not run_folder.is_aside(tmp_path)
    (aside / "model.safetensors").write_text("new")
    (aside / "config.json").write_text("new")
    run_folder.move_into(aside)
    assert names(tmp_path) == ["config.json", "model.safetensors", "notes.txt"]
    assert (tmp_path / "config.json").read_text() == "new"
