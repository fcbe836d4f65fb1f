"""The checkpoints of a run folder: written aside and renamed, found again, rotated; and a folder that is used again.

A checkpoint is written into `.saving-checkpoint-<step>` and gets its name when all of it is on the disk. Names that
start with a dot are steps of that work. A process that is killed in the middle leaves one of them behind, and
`recover` finishes or removes it:

    .saving-checkpoint-9      being written. With a whole manifest only the renaming is missing
    .replaced-checkpoint-9    an older checkpoint of the same step, until the new one has its name
    .deleting-checkpoint-9    being deleted
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from torch import nn

from fastalign.errors import ConfigError, DataError
from fastalign.files import check_writable
from fastalign.models.adapters import has_adapter
from fastalign.training.manifest import find_damage, flush_files, flush_folder, write_manifest

logger = logging.getLogger("fastalign")

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_SAVING, _REPLACED, _DELETING, _SET_ASIDE = ".saving-", ".replaced-", ".deleting-", "set-aside-"
# What a run leaves in its folder beside checkpoints: what shows that there was a run, and what else goes with it. The
# options and the preflight report are not listed, because a new run has written its own before training starts.
_RESULTS = ("metrics.jsonl", "summary.json", "adapter_model.safetensors")
_BESIDE = ("adapter_config.json", "nonfinite_rows.jsonl", "samples.jsonl", "report.html", "traceback.txt")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints in a run folder, the newest last. They may be damaged."""
    found = [path for path in run.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint; -1 if its name has none."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def check_folder(run: Path, given: str | bool | None, *, overwrite: bool, writes: bool) -> None:
    """Finds what is wrong with a run folder before anything expensive is done. It reads no checksums.

    Args:
        run: The run folder.
        given: The option resume_from_checkpoint.
        overwrite: The option overwrite_output_dir.
        writes: Whether this process is the one that writes into the folder.

    Raises:
        ConfigError: The folder cannot be made or written, or holds another run.
        DataError: No checkpoint can be gone on from.
    """
    check_writable("output_dir", run)
    if writes:
        recover(run)
    if given is None or given is False:
        check_unused(run, overwrite)
    else:
        find_checkpoint(run, given, early=True)


def find_checkpoint(run: Path, given: str | bool | None, *, early: bool = False) -> Path | None:
    """The checkpoint that training goes on from; None if it starts from the beginning.

    Args:
        run: The run folder.
        given: A checkpoint folder; True or "last" for the newest whole one of the run; None or False for none.
        early: Compare sizes but no checksums, and say nothing of damaged ones.

    Raises:
        ConfigError: There is no such folder.
        DataError: The checkpoint is damaged, or all of them are.
    """
    if given is None or given is False:
        return None
    if given is not True and str(given).lower() not in ("true", "last"):
        path = Path(given)
        if not path.is_dir():
            raise ConfigError(f"resume_from_checkpoint is {str(given)!r}, which is no folder")
        if damage := find_damage(path, checksums=not early):
            raise DataError(f"{path} {damage}: give resume_from_checkpoint=last, which takes the newest whole one.")
        return path
    return _newest_whole(run, early)


def _newest_whole(run: Path, early: bool) -> Path | None:
    damaged = []
    for path in reversed(checkpoints(run)):
        damage = find_damage(path, checksums=not early)
        if damage is None:
            for sentence in () if early else damaged:
                logger.warning("%s; training goes on from %s.", sentence, path.name)
            return path
        damaged.append(f"{path} {damage}")
    if damaged:
        raise DataError(
            f"No checkpoint in {run} is whole: {'; '.join(damaged)}. Leave out resume_from_checkpoint and set "
            "overwrite_output_dir=true to start again."
        )
    if not early:
        logger.warning("There is no checkpoint in %s: training starts from the beginning.", run)
    return None


# Writing


def check_space(run: Path, model: nn.Module, optimizer: str) -> None:
    """ConfigError if one checkpoint will not fit on the disk of the run folder.

    A checkpoint holds at least what is trained (all weights, where there is no adapter), and AdamW's two moments.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    saved = trained if has_adapter(model) else sum(p.numel() * p.element_size() for p in model.parameters())
    needed = saved + (2 * trained if optimizer.startswith("adamw_torch") else 0)
    free = shutil.disk_usage(run).free
    if free < needed:
        raise ConfigError(
            f"output_dir {str(run)!r} is on a disk with {free / 1e9:.2f} GB free, and one checkpoint takes at least "
            f"{needed / 1e9:.2f} GB: make room, name another folder, or set save_strategy=no"
        )


def start_checkpoint(run: Path, step: int) -> Path:
    """An empty folder in which the checkpoint of a step is written."""
    folder = aside_of(run, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def aside_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it gets its name."""
    return run / f"{_SAVING}checkpoint-{step}"


def finish_checkpoint(aside: Path) -> Path:
    """Flushes a checkpoint to the disk, writes its manifest, and gives it its name, which it returns."""
    final = aside.with_name(aside.name.removeprefix(_SAVING))
    write_manifest(aside, step_of(final))
    _give_name(aside, final)
    return final


def _give_name(aside: Path, final: Path) -> None:
    replaced = final.with_name(_REPLACED + final.name)
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    flush_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(run: Path) -> None:
    """Finishes or removes what a killed process left in the middle of saving or deleting a checkpoint."""
    for aside in run.glob(f"{_SAVING}checkpoint-*"):
        final = aside.with_name(aside.name.removeprefix(_SAVING))
        if not final.exists() and find_damage(aside) is None:
            _give_name(aside, final)
        else:
            shutil.rmtree(aside, ignore_errors=True)
    for replaced in run.glob(f"{_REPLACED}checkpoint-*"):
        final = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(final)
    for deleting in [*run.glob(f"{_DELETING}*"), run / f"{_SAVING}model"]:
        shutil.rmtree(deleting, ignore_errors=True)


def save_aside(folder: Path) -> Path:
    """An empty folder inside `folder` in which a model is written, for `move_into`."""
    aside = folder / f"{_SAVING}model"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def is_aside(folder: Path) -> bool:
    """Whether a folder is one in which something is written aside."""
    return folder.name.startswith(_SAVING)


def move_into(aside: Path) -> None:
    """Moves the files of `save_aside` into its folder. Each takes its name at once, whole and on the disk."""
    flush_files(aside)
    folder, names = aside.parent, {path.name for path in aside.iterdir()}
    for path in aside.iterdir():
        target = folder / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        path.replace(target)
    if any(_WEIGHTS.fullmatch(name) for name in names):
        # Weights of another model in as many or fewer files, which transformers would find first.
        for path in folder.iterdir():
            if _WEIGHTS.fullmatch(path.name) and path.name not in names:
                path.unlink()
    aside.rmdir()
    flush_folder(folder)


# Deleting


def delete(checkpoint: Path) -> None:
    """Deletes a checkpoint. It loses its name first, so that no half of it is ever taken for a checkpoint."""
    doomed = checkpoint.with_name(_DELETING + checkpoint.name)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(run: Path, limit: int | None, keep: Path | None) -> None:
    """Deletes the oldest checkpoints until at most `limit` are left. Damaged ones do not count, and are left alone.

    Args:
        run: The run folder.
        limit: The most checkpoints; None or 0 for no limit. The newest whole one always stays.
        keep: One that always stays, the best one.
    """
    if not limit or limit < 0:
        return
    whole = [path for path in checkpoints(run) if find_damage(path, checksums=False) is None]
    stay = {path.resolve() for path in (*whole[-1:], *([keep] if keep else []))}
    excess = len(whole) - max(limit, len(stay))
    for path in [path for path in whole if path.resolve() not in stay][: max(excess, 0)]:
        delete(path)


# A folder that is used again


def set_aside_later(run: Path, checkpoint: Path) -> None:
    """Renames checkpoints of later steps than the one that training goes on from.

    They belong to another continuation of the run. "last" would take them for this one's.
    """
    if checkpoint.resolve().parent != run.resolve():
        return
    for later in checkpoints(run):
        if step_of(later) > step_of(checkpoint):
            number, target = 1, run / f"{_SET_ASIDE}{later.name}"
            while target.exists():
                number += 1
                target = run / f"{_SET_ASIDE}{later.name}-{number}"
            later.rename(target)
            logger.warning("%s comes after %s: it is now %s.", later, checkpoint.name, target.name)


def check_unused(run: Path, overwrite: bool) -> None:
    """ConfigError if a new run in this folder would mix with an older one that lies there."""
    left = [path.name for path in checkpoints(run)[-1:]] + [name for name in _RESULTS if (run / name).exists()]
    if left and not overwrite:
        raise ConfigError(
            f"output_dir {str(run)!r} holds a run already ({left[0]}): go on with it by resume_from_checkpoint=last, "
            "name another output_dir, or set overwrite_output_dir=true, which deletes the old run"
        )


def clear(run: Path) -> None:
    """Deletes what an older run left in the folder."""
    for path in [*checkpoints(run), *run.glob(f"{_SET_ASIDE}checkpoint-*")]:
        delete(path)
    for name in (*_RESULTS, *_BESIDE):
        (run / name).unlink(missing_ok=True)
