"""How every number is made: a check against float64, then interleaved timed runs, then memory in a fresh process.

A suite gives `measure` its candidates. A candidate is a function that computes the case once and returns its tensors.
The result is one `Measurement` per implementation that ran and was right.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from fastalign.errors import BackendError
from fastalign.files import write_text

Outputs = dict[str, Tensor]
PACKAGES = (
    "fastalign", "torch", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy", "backpack-for-pytorch",
)  # fmt: skip
# The bare matrix products of a case, which no implementation can avoid. Their names contain this.
FLOOR = "matrix product"
ROOT = Path(__file__).parents[2]


class Missing(Exception):
    """An implementation cannot run here. The message says why, and what to do."""


class WrongResult(Exception):
    """The result of an implementation is further from float64 than the rounding of its dtype explains."""


@dataclass(frozen=True)
class Checked:
    """The errors of a result that is within its budget, and which part of it was compared.

    Attributes:
        errors: output -> largest error against float64, or against what `scope` names.
        scope: what was compared, for example "64 of 2048 rows".
    """

    errors: dict[str, float]
    scope: str


@dataclass(frozen=True)
class Measurement:
    """One implementation on one case: one record of the JSON files.

    The runs of all implementations of a case are interleaved (A B A B ...).

    Attributes:
        suite: name of the suite.
        case: name of the case.
        sizes: the numbers of the case, such as {"n": 2048, "h": 576, "v": 49152}.
        implementation: name of the implementation.
        median_s: median of the runs, in seconds.
        q1_s: first quartile, in seconds.
        q3_s: third quartile, in seconds.
        runs: how many runs were timed.
        peak_extra_bytes: peak memory of one run in a fresh process, minus the memory in use before it. None if it was
            not measured.
        errors: output -> largest error. Log-probs are in nats, gradients relative to their largest entry. The error is
            against float64, except in two suites (`checked` says so there): in `train` it is that of the loss, against
            the other trainer's loss or fastalign's loss in float32. In the whole steps of `scale` it is that of the
            log-probs, against those of the model's float32 logits.
        checked: what was compared.
        device: name of the GPU or the CPU.
        threads: CPU threads that torch used.
        load: the machine's 1-minute load average before timing began.
        versions: package -> version.
        commit: git commit, with a "+" if files were changed.
        date: when the record was made, in UTC.
        skipped: implementation -> why this case has no record of it. It is the same in all records of a case.
        losses: loss of each step of the first run (suite `train` only).
    """

    suite: str
    case: str
    sizes: dict[str, int]
    implementation: str
    median_s: float
    q1_s: float
    q3_s: float
    runs: int
    peak_extra_bytes: int | None
    errors: dict[str, float]
    checked: str
    device: str
    threads: int
    load: float
    versions: dict[str, str]
    commit: str
    date: str
    skipped: dict[str, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self):
        if not self.errors or not all(math.isfinite(error) for error in self.errors.values()) or not self.checked:
            raise ValueError(
                f"{self.implementation} on {self.case} has errors {self.errors}, but a record needs finite errors and "
                "a text that says what was checked: check it before timing it"
            )
        if not 0 < self.q1_s <= self.median_s <= self.q3_s:
            raise ValueError(
                f"{self.implementation} on {self.case} has quartiles {self.q1_s, self.median_s, self.q3_s}, which must "
                "be above 0 and ascending"
            )


def save(measurements: list[Measurement], path: Path) -> None:
    """Writes the records as a JSON list. The file is replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([asdict(m) for m in measurements], indent=1) + "\n")


def load(path: Path) -> list[Measurement]:
    """Reads the records of one JSON file. Fields that have a default value may be missing.

    Raises:
        ValueError: a record lacks another field, or has an unknown one.
    """
    required = {f.name: f.default is f.default_factory is MISSING for f in fields(Measurement)}
    records = json.loads(path.read_text(encoding="utf-8"))
    for record in records:
        wrong = [name for name in record.keys() ^ required.keys() if required.get(name, True)]
        if wrong:
            raise ValueError(f"{path} does not hold measurements: the fields {sorted(wrong)} are missing or unknown")
    return [Measurement(**record) for record in records]


def quartiles(seconds: list[float]) -> list[float]:
    """First quartile, median and third quartile. Of a single run all three are its seconds."""
    return statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, in the order A B C A B C ..., `rounds` times.

    Interleaving makes a change of the machine's load affect all implementations alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds):
        for name, run in runs.items():
            say(f"    round {round_number + 1}/{rounds}: {name}", same_line=True)
            seconds[name].append(seconds_of(run))
    return seconds


def measure(
    suite: str,
    case: str,
    sizes: dict[str, int],
    candidates: Mapping[str, Callable[[], Outputs] | str],
    check: Callable[[str, Outputs], Checked],
    memory: Callable[[str], int | None],
    rounds: int,
) -> list[Measurement]:
    """Runs and checks every candidate, then times the right ones interleaved and measures their memory.

    Args:
        suite: name of the suite.
        case: name of the case.
        sizes: the numbers of the case, for the records.
        candidates: name -> a function that computes the case once, or a text that says why it cannot run here.
        check: `check(name, outputs)` returns what it compared, or raises WrongResult.
        memory: `memory(name)` is the peak memory of one run in bytes, or None.
        rounds: timed runs per candidate.

    Returns:
        One record per candidate that ran and was right. Each names the other candidates, with the reason, in `skipped`.
    """
    checked, skipped = {}, {}
    for name, run in candidates.items():
        if isinstance(run, str):
            skipped[name] = run
            continue
        say(f"    checking {name}", same_line=True)
        try:
            checked[name] = check(name, run())
        except WrongResult as wrong:
            skipped[name] = f"wrong: {wrong}"
            say(f"    REFUSED {name}: {wrong}")
    load_before = os.getloadavg()[0]
    seconds = interleaved({name: candidates[name] for name in checked}, rounds)
    about = environment()
    measurements = []
    for name, result in checked.items():
        say(f"    memory of {name}", same_line=True)
        q1, median, q3 = quartiles(seconds[name])
        measurements.append(
            Measurement(
                suite,
                case,
                sizes,
                name,
                median,
                q1,
                q3,
                rounds,
                memory(name),
                result.errors,
                result.scope,
                load=round(load_before, 2),
                skipped=skipped,
                **about,
            )
        )
    say("", same_line=True)
    return measurements


def environment() -> dict:
    """The fields device, threads, versions, commit and date of a Measurement."""
    installed = {package: number for package in PACKAGES if (number := _version_of(package))}
    versions = {"python": platform.python_version()} | installed
    if "fastalign" not in versions:  # the checkout is not installed
        import fastalign

        versions["fastalign"] = fastalign.__version__
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name, its number of cores, and the widest vector instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The commit of the checkout, or "unknown" outside a checkout.

    A "+" follows if files that influence the results differ from the commit.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "fastalign", "kernels", "csrc", "bench/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_extra_memory(run: Callable[[], object]) -> int:
    """Peak memory in bytes while `run` runs, minus the memory in use before it.

    On CUDA it is the allocator's memory, elsewhere the resident set. Call it in a fresh process: `run` could reuse
    memory that was freed earlier, and that would not be counted.

    Raises:
        SystemExit: the system cannot reset the peak of a process (Linux can).
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _return_freed_memory()
    if not _reset_peak():
        raise SystemExit(
            "/proc/self/clear_refs cannot be written, so the peak would include memory of before: measure memory on "
            "Linux, where a process may reset its peak"
        )
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def peak_resident(*, reset: bool = False) -> int:
    """The peak resident set of this process in bytes. On CUDA it is the peak of the allocator instead.

    With `reset` it is the present size, and a new peak is counted from now on.
    """
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()
    if reset and _reset_peak():
        return _status_bytes("VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if reset else _status_bytes("VmHWM")


def memory_in_fresh_process(suite: str, case: str, implementation: str) -> int | None:
    """Peak extra bytes of one implementation, from `python -m bench memory ...`. None if that failed (it says why)."""
    threads = torch.get_num_threads()
    command = [sys.executable, "-m", "bench", "memory", suite, case, implementation, "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"    memory of {implementation} not measured: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return int(done.stdout.split()[-1])


# Runs on 1/16 and, if needed, 1/4 of the rows decide whether a run on all rows fits the limit.
FRACTIONS = (16, 4)
COMPILING_S = 40  # seconds that compiling may add to a first run


def timed(run: Callable[[], object], limit_s: float = math.inf) -> float:
    """Seconds of the second run, because the first one also loads libraries and compiles.

    Exception: if the first run took longer than loading and compiling explain, its seconds count.
    """
    first = seconds_of(run)
    return first if first > COMPILING_S + 2 * limit_s else seconds_of(run)


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one run, including the wait for the GPU."""
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def too_slow(part: Callable[[int], Callable[[], object]], limit_s: float) -> str | None:
    """Says why a run on all rows may take longer than the limit, or returns None. part(16) runs 1/16 of the rows.

    The time on few rows is not multiplied by the fraction, because some implementations take nearly as long on few
    rows as on all of them.
    """
    for fraction in FRACTIONS:
        seconds = timed(part(fraction), limit_s)
        if fraction * seconds <= limit_s:
            return None
        if seconds > limit_s / 2:
            return f"1/{fraction} of the rows took over half the limit of {limit_s:.0f} s (--limit)"
    return None


def able(
    names: list[str], part: Callable[[str, int], Callable[[], Outputs]], limit_s: float
) -> dict[str, Callable[[], Outputs] | str]:
    """Name -> the candidate, if it can run here within `limit_s` seconds, else a text that says why not.

    The bare matrix products have no limit. part(name, 16) is the candidate on 1/16 of the rows, part(name, 1) is the
    one to measure.
    """
    candidates: dict[str, Callable[[], Outputs] | str] = {}
    for name in names:
        say(f"    trying {name} on some of the rows", same_line=True)
        try:
            allowed = math.inf if FLOOR in name else limit_s  # every table compares with the bare products
            candidates[name] = too_slow(partial(part, name), allowed) or part(name, 1)
        except (Missing, BackendError) as reason:
            candidates[name] = str(reason)
        except Exception as error:  # an error in one implementation must not stop the others
            candidates[name] = f"it raised {type(error).__name__}: {' '.join(str(error).splitlines()[:1])[:200]}"
        if isinstance(candidates[name], str):
            say(f"    skipped {name}: {candidates[name]}")
    return candidates


def memory_of(suite: str, case: str, implementation: str, make: Callable[[str], Callable[[], object]]) -> int | None:
    """Peak extra bytes of one run. make(implementation) is a candidate that holds no memory yet.

    On CUDA it runs in this process, because the allocator counts exactly. Elsewhere it runs in a fresh process.
    """
    if torch.cuda.is_available():
        return peak_extra_memory(make(implementation))
    return memory_in_fresh_process(suite, case, implementation)


def say(text: str, *, same_line: bool = False) -> None:
    """Prints progress to stderr.

    With `same_line` the next message overwrites this one, and nothing is printed if stderr is not a terminal.
    """
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="" if same_line else "\n", file=sys.stderr, flush=True)
    elif not same_line:
        print(text, file=sys.stderr, flush=True)


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _return_freed_memory() -> None:
    """Returns freed memory to the system: glibc's malloc keeps it, and a run that reuses it would not be counted."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    """Sets VmHWM, the peak of this process, to its present size ("5" in clear_refs on Linux). False if that failed."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
