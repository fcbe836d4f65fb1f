"""Full disks, read-only folders and memory limits at many points of a run: each must give one clear sentence.

    make soak
    .venv/bin/python tests/soak/faults.py --short                   five points
    .venv/bin/python tests/soak/faults.py "metrics, disk full"      one point alone

Every point runs a real command in a forked process with its own mounts. The fault is a real one of the kernel: a small
tmpfs that is filled or mounted read-only, a limit on the size of files, a limit on memory. A fault in mid-run is
switched on when the command is about to call the function that the point names. Afterwards the fault is taken away, and
what was there before must be intact: the checkpoints are whole, and the same command goes on from them to its end.

A point is good if

- the exit code is 2, with one sentence on the terminal, no traceback, and no name of a foreign exception;
- or the point says that the command can go on without what failed: then the exit code is 0, with a warning.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from soak import PAIRS, ROWS, byte_tokenizer, tiny_model

import fastalign.cli.run  # noqa: F401 -- in the parent, so that no fork imports torch, peft and transformers again
from fastalign.cli.main import main as command
from fastalign.training.manifest import find_damage
from fastalign.training.run_folder import checkpoints

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 32, 16384, 1 << 18
MB = 1 << 20


# The faults


def mount(target: Path, size: int | None = None, flags: int = 0) -> None:
    """Mounts a tmpfs, or changes one that is mounted."""
    options = f"size={size}".encode() if size else b""
    if LIBC.mount(b"faults", str(target).encode(), b"tmpfs", flags, options):
        raise OSError(ctypes.get_errno(), f"{target} cannot be mounted; run as root or with user namespaces")


def own_mounts() -> None:
    """Gives this process mounts that nobody else sees."""
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)):
        raise OSError(ctypes.get_errno(), "no own mounts; run as root or with user namespaces")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    LIBC.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)


class Fault:
    """One fault, switched on and off. `place` is the folder that is full or read-only, a tmpfs of 256 MB."""

    def __init__(self, kind: str, place: Path):
        self.kind, self.place = kind, place

    def on(self) -> None:
        """Switches it on."""
        if self.kind.startswith("full"):
            left = int(self.kind.removeprefix("full").removeprefix(" but ") or 0)
            with (self.place / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while shutil.disk_usage(self.place).free > left or not left:
                    file.write(b"0" * 4096)
        elif self.kind == "read-only":
            mount(self.place, flags=MS_REMOUNT | MS_RDONLY)
        elif self.kind.startswith("file size"):
            limit = int(self.kind.split()[-1])
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        else:  # memory N: so many bytes more than now
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + int(self.kind.split()[-1])
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def off(self) -> None:
        """Takes it away."""
        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS):
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if self.kind == "read-only":
            mount(self.place, size=256 * MB, flags=MS_REMOUNT)
        (self.place / "ballast").unlink(missing_ok=True)


# The points


class Point(NamedTuple):
    """One point of a command at which something fails.

    Attributes:
        words: The command; RUN, OUT, CACHE and so on are folders of the point.
        fault: "full", "full but N", "read-only", "file size N" or "memory N", N in bytes.
        place: The folder that the fault is in.
        at: The function before which it is switched on, as module:name; None: before the command.
        call: The number of that function's call.
        before: A command that must have run before.
        goes_on: Whether the command may do without what failed.
        warns: What it says if it does.
    """

    words: str
    fault: str
    place: str = "RUN"
    at: str | None = None
    call: int = 1
    before: str | None = None
    goes_on: bool = False
    warns: str = ""


FISHER = "fisher MODEL --text TEXT --out OUT/fisher.safetensors --length 64"
COMMON = "use_cpu=true disable_tqdm=true logging_steps=1 per_device_train_batch_size=2 learning_rate=1e-3 samples=2"
COMMON += " max_new_tokens=4"
SFT = f"sft model=MODEL train=ROWS output_dir=RUN/mine max_steps=3 save_steps=1 lora_rank=2 {COMMON}"
FULL = SFT.replace("lora_rank=2", "lora_rank=0 dtype=float32")
DPO = "dpo model=MODEL train=PAIRS eval=PAIRS output_dir=RUN/mine ref_cache_dir=CACHE/fa max_steps=3 save_steps=1 "
DPO += COMMON
SHORT = SFT.replace("max_steps=3", "max_steps=2")
LAST = " resume_from_checkpoint=last"
LARGE = f"sft model=LARGE train=ROWS eval=ROWS output_dir=RUN/mine max_steps=3 save_steps=1 {COMMON} dtype=float32"
LONG = LARGE.replace("=ROWS", "=LONGROWS").replace("max_steps=3", "max_steps=1") + " max_length=4096"
CHECKPOINT = "fastalign.training.checkpoint"

POINTS = {
    "before the start, disk full": Point(SFT, "full"),
    "before the start, read-only": Point(SFT, "read-only"),
    "too little room for one checkpoint": Point(
        LARGE + " lora_rank=0", f"full but {20 * MB}", at="fastalign.training.trainer:check_fit"
    ),
    "rows read, read-only cache of datasets": Point(SFT, "read-only", "CACHE", goes_on=True),
    "rows read, full cache of datasets": Point(SFT, "full", "CACHE", goes_on=True),
    "temporary folder full": Point(SFT, "full", "TMP", goes_on=True),
    "temporary folder read-only": Point(SFT, "read-only", "TMP", goes_on=True),
    "cache of the reference, read-only": Point(DPO, "read-only", "CACHE"),
    "cache of the reference, full before": Point(DPO, "full", "CACHE"),
    "cache of the reference, full when written": Point(
        DPO, "full", "CACHE", at="fastalign.training.reference:write_keyed", goes_on=True,
        warns="cannot be stored"
    ),
    "options written, disk full": Point(SFT, "full", at="fastalign.cli.run:run_record"),
    "metrics, disk full": Point(SFT, "full", at="fastalign.training.callbacks:append_metrics", call=2),
    "metrics, read-only": Point(SFT, "read-only", at="fastalign.training.callbacks:append_metrics", call=2),
    "first checkpoint, disk full": Point(SFT, "full", at=f"{CHECKPOINT}:start_checkpoint"),
    "second checkpoint, its weights": Point(FULL, "full", at=f"{CHECKPOINT}:start_checkpoint", call=2),
    "second checkpoint, its optimiser": Point(FULL, "full", at=f"{CHECKPOINT}:save_state", call=6),
    "second checkpoint, its manifest": Point(FULL, "full", at=f"{CHECKPOINT}:finish_checkpoint", call=2),
    "second checkpoint, read-only": Point(FULL, "read-only", at=f"{CHECKPOINT}:save_state", call=6),
    "second checkpoint, files too large": Point(
        FULL, "file size 100000", at=f"{CHECKPOINT}:start_checkpoint", call=2
    ),
    "rotation, read-only": Point(SFT + " save_total_limit=1", "read-only", at=f"{CHECKPOINT}:rotate", call=2),
    "adapter at the end, disk full": Point(SFT, "full", at=f"{CHECKPOINT}:save_aside"),
    "all weights at the end, read-only": Point(FULL, "read-only", at=f"{CHECKPOINT}:save_aside"),
    "summary, disk full": Point(SFT, "full", at="fastalign.cli.run:_summary"),
    "report, disk full": Point(SFT, "full", at="fastalign.cli.run:write_report"),
    "report of a run, read-only": Point("report RUN/mine", "read-only", before=SFT),
    "resume, disk full": Point(SFT + LAST, "full", before=SHORT),
    "resume, read-only": Point(SFT + LAST, "read-only", before=SHORT),
    "resume, disk full at its first checkpoint": Point(
        SFT + LAST, "full", at=f"{CHECKPOINT}:start_checkpoint", before=SHORT
    ),
    "rows that are not finite, disk full": Point(
        FULL.replace("learning_rate=1e-3", "learning_rate=1e30 max_grad_norm=0"), "full",
        at="fastalign.training.guard:write_jsonl",
    ),
    "merge, disk full": Point("merge RUN/mine --out OUT/merged", "full", "OUT", before=SFT),
    "merge, read-only": Point("merge RUN/mine --out OUT/merged", "read-only", "OUT", before=SFT),
    "merge, disk full in mid-save": Point(
        "merge RUN/mine --out OUT/merged", "file size 100000", "OUT", at="fastalign.models.merging:merge_adapter",
        before=SFT,
    ),
    "answers, disk full": Point(
        "generate MODEL --prompts ROWS --out OUT/answers.jsonl --max-new-tokens 2", "full", "OUT",
    ),
    "answers, read-only": Point(
        "generate MODEL --prompts ROWS --out OUT/answers.jsonl --max-new-tokens 2", "read-only", "OUT"
    ),
    "comparison, disk full": Point(
        "compare MODEL MODEL --prompts ROWS --out OUT/found.json --max-new-tokens 2", "full", "OUT"
    ),
    "rows written, disk full": Point("data check ROWS --model MODEL --out OUT/rows.jsonl", "full", "OUT"),
    "rows written, read-only": Point("data check ROWS --model MODEL --out OUT/rows.jsonl", "read-only", "OUT"),
    "Fisher information, disk full": Point(FISHER, "full", "OUT"),
    "Fisher information, full when written": Point(
        FISHER, "full", "OUT",
        at="fastalign.fisher.diagonal:fisher_diagonal",
    ),
    "Fisher information, read-only": Point(FISHER, "read-only", "OUT"),
    "tax, disk full": Point("tax MODEL MODEL --text TEXT --out OUT/tax --length 64", "full", "OUT"),
    "tax, read-only": Point("tax MODEL MODEL --text TEXT --out OUT/tax --length 64", "read-only", "OUT"),
    "memory, while the model is loaded": Point(
        LARGE + " lora_rank=0", f"memory {8 * MB}", at="fastalign.training.trainer:load_start"
    ),
    "memory, evaluation": Point(
        f"{LONG} lora_rank=2", f"memory {24 * MB}", at="fastalign.training.evaluation:held_out",
        goes_on=True, warns="computed in parts",
    ),
    "memory, first step": Point(
        f"{LONG} lora_rank=2", f"memory {24 * MB}", at="fastalign.training.trainer:_step_totals",
        goes_on=True, warns="computed in parts",
    ),
    "memory, optimiser": Point(
        LARGE + " lora_rank=0", "memory 0",
        at="fastalign.training.guard:FiniteGuard.on_pre_optimizer_step",
    ),
    "memory, reference": Point(
        LONG.replace("sft", "dpo").replace("LONGROWS", "LONGPAIRS") + " lora_rank=0 ref_cache_dir=CACHE/fa",
        f"memory {24 * MB}", at="fastalign.training.preference:precompute", goes_on=True, warns="",
    ),
    "memory, answers": Point(
        "generate LARGE --prompts ROWS --out OUT/answers.jsonl --max-new-tokens 2", f"memory {8 * MB}", "OUT",
        at="fastalign.models.runs:load_model",
    ),
    "memory, merge": Point(
        "merge RUN/mine --out OUT/merged", f"memory {8 * MB}", "OUT", at="fastalign.models.merging:load_with_adapter",
        before=LARGE + " lora_rank=2",
    ),
}  # fmt: skip
SHORT_FORM = (
    "before the start, read-only", "metrics, disk full", "second checkpoint, its optimiser",
    "adapter at the end, disk full", "memory, while the model is loaded",
)  # fmt: skip


def spring(point: Point, fault: Fault) -> None:
    """Lets the function that the point names switch the fault on before it runs."""
    if point.at is None:
        fault.on()
        return
    module, _, name = point.at.partition(":")
    owner, count = importlib.import_module(module), 0
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    name = name.rpartition(".")[-1]
    works = getattr(owner, name)

    def springs(*args, **kwargs):
        nonlocal count
        count += 1
        if count == point.call:
            fault.on()
        return works(*args, **kwargs)

    setattr(owner, name, springs)


def show_log_on(stream) -> None:
    """Lets the log write to another stream. Not by `setStream`, which flushes the old one, and that is closed."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.stream = stream


def said_by(words: list[str]) -> tuple[int, str, str]:
    """Runs a command; its exit code, and what it wrote to both streams, C++ code included."""
    with tempfile.TemporaryFile(dir="/dev/shm") as out, tempfile.TemporaryFile(dir="/dev/shm") as err:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(os.dup(i), "wb"), write_through=True) for i in (1, 2))
        show_log_on(sys.stderr)
        try:
            status = command(words)
        finally:
            sys.stdout.close()
            sys.stderr.close()
            for i, old in enumerate(kept, 1):
                os.dup2(old, i)
                os.close(old)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            show_log_on(sys.stderr)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return status, *texts


def judge(point: Point, status: int, out: str, err: str) -> str | None:
    """What is wrong with what a command said; None if nothing is."""
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.strip()]
    if "Traceback" in out + err:
        return f"a traceback: {err[-600:]}"
    if status == 0 and point.goes_on:
        told = not point.warns or any(point.warns in line for line in lines)
        return None if told else f"it went on without {point.warns!r}: {err[-600:]}"
    if status != 2:
        return f"exit code {status}: {err[-600:]}"
    sentences = [line for line in lines if line.startswith("fastalign: ")]
    if len(sentences) != 1 or lines[-1] != sentences[0]:
        return f"{len(sentences)} sentences: {err[-600:]}"
    if "stopped by " in sentences[0]:
        return f"a foreign error: {sentences[0]}"
    return None


def check(point: Point, folders: dict[str, Path]) -> tuple[str | None, str]:
    """Runs a point in this process. Returns what is wrong, and what was said."""
    own_mounts()
    for name in ("RUN", "OUT", "CACHE", "TMP"):
        mount(folders[name], 256 * MB)
    os.environ["XDG_CACHE_HOME"] = str(folders["CACHE"])
    os.environ["TMPDIR"] = tempfile.tempdir = str(folders["TMP"])
    importlib.import_module("datasets").config.HF_DATASETS_CACHE = str(folders["CACHE"] / "datasets")

    def words(text: str) -> list[str]:
        for name, folder in folders.items():
            text = text.replace(name, str(folder))
        return text.split()

    run = folders["RUN"] / "mine"
    if point.before and (failed := said_by(words(point.before)))[0]:
        return f"the command before failed: {failed}", ""
    (run / "report.html").write_text("older") if run.exists() else None
    fault = Fault(point.fault, folders[point.place])
    spring(point, fault)
    whole = {path.name for path in checkpoints(run)} if point.before and run.exists() else set()
    status, out, err = said_by(words(point.words))
    fault.off()
    wrong = judge(point, status, out, err) or state_after(point, folders, whole, words)
    lines = [line.strip() for line in err.replace("\r", "\n").split("\n") if line.strip() and "batch/s" not in line]
    return wrong, "; ".join(line for line in lines if point.goes_on or line.startswith("fastalign: "))


def state_after(point: Point, folders: dict[str, Path], whole: set[str], words: Callable) -> str | None:
    """What is wrong with what a command left behind; None if nothing is."""
    run, name = folders["RUN"] / "mine", point.words.split()[0]
    left = checkpoints(run) if run.exists() else []
    if damaged := [f"{path.name} {damage}" for path in left if (damage := find_damage(path))]:
        return f"damaged: {damaged}"
    if lost := whole - {path.name for path in left}:
        return f"lost: {lost}"
    halves = [p.name for p in folders["OUT"].rglob("*") if p.is_file() and p.name != "ballast"]
    if halves and not point.goes_on:
        return f"half an output was left: {halves}"
    if name in ("sft", "dpo") and "1e30" not in point.words:
        for attribute in ("samples=2",):  # the same command goes on, or starts
            text = point.words.replace(attribute, "samples=0")
        again = words(text if LAST in text else text + LAST)
        again += ["overwrite_output_dir=true"] if not left else []
        if (done := said_by(again))[0]:
            return f"does not go on: {done[2][-600:]}"
    return None


def forked(point: Point, folders: dict[str, Path]) -> tuple[str | None, str]:
    """`check` in a forked process."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            found = check(point, folders)
        except BaseException:
            found = (traceback.format_exc()[-1500:], "")
        os.write(write, json.dumps(found).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return tuple(json.loads(text)) if text else (f"the process died, status {status}", "")


@contextlib.contextmanager
def prepared() -> Iterator[dict[str, Path]]:
    """Models, rows, and empty folders to mount on, by the names that stand for them in commands."""
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        place = Path(temporary)
        folders = {name: place / name.lower() for name in ("RUN", "OUT", "CACHE", "TMP", "MODEL", "LARGE")}
        for folder in folders.values():
            folder.mkdir()
        tiny_model().save_pretrained(folders["MODEL"])
        large = tiny_model().config
        large.hidden_size, large.intermediate_size, large.max_position_embeddings = 512, 2048, 4096
        transformers.LlamaForCausalLM(large).save_pretrained(folders["LARGE"])
        for name in ("MODEL", "LARGE"):
            byte_tokenizer().save_pretrained(folders[name])
        long = [{"prompt": f"Question {i}?", "completion": f"word {i} " * 200} for i in range(4)]
        long_pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no " * 400} for r in long]
        for name, rows in (("LONGROWS", long), ("LONGPAIRS", long_pairs), ("ROWS", ROWS), ("PAIRS", PAIRS)):
            folders[name] = place / f"{name.lower()}.jsonl"
            folders[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders["TEXT"] = place / "text.txt"
        folders["TEXT"].write_text("The river rises in the hills. " * 8)
        yield folders


def quiet() -> None:
    """Nothing but what commands say themselves."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    importlib.import_module("datasets").disable_progress_bars()


def main(names: list[str]) -> int:
    """Runs the points and prints a table; 1 if one is not good."""
    quiet()
    names = [*SHORT_FORM] if names == ["--short"] else names
    points = {name: POINTS[name] for name in names or POINTS}
    bad = 0
    with prepared() as folders:
        for name, point in points.items():
            wrong, sentence = forked(point, folders)
            bad += wrong is not None
            said = sentence.replace(str(folders["RUN"].parent), "...")
            print(f"{'BAD ' if wrong else 'good'} {name}\n       {said[:260]}", flush=True)
            if wrong:
                print(f"       WRONG: {wrong}", flush=True)
    print(f"\n{len(points)} points, {len(points) - bad} of them give one clear sentence and leave the state intact")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
