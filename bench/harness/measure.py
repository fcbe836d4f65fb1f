"""How every number here is made: check against float64 first, then interleaved runs, then memory in a fresh process.

A suite hands `measure` its candidates, each a function that computes the case once and returns its tensors; out come
`Measurement` records, one per implementation that ran and was right.
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

Outputs = dict[str, Tensor]
PACKAGES = (
    "fastalign", "torch", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy", "backpack-for-pytorch",
)  # fmt: skip
FLOOR = "matrix product"  # in the name of what no implementation can be faster than
ROOT = Path(__file__).parents[2]


class Missing(Exception):
    """An implementation cannot run here; the message says why and what to do."""


class WrongResult(Exception):
    """An implementation's result is further from float64 than its dtype explains."""


@dataclass(frozen=True)
class Checked:
    """An implementation's result was within its error budget: the errors found, and which part was compared."""

    errors: dict[str, float]  # output -> max error, against float64 unless `scope` says against what
    scope: str  # what was compared, e.g. "64 of 2048 rows"


@dataclass(frozen=True)
class Measurement:
    """One implementation on one case. Seconds are of interleaved runs (A B A B ...) with the others of that case.

    errors: output -> max error (log-probs: nats; gradients: relative to the largest entry) against float64; against
        what else, `checked` says: in `train` it is the loss, against the other trainer's or fastalign's own in float32,
        in `scale`'s whole steps the log-probs, against the model's own float32 logits.
    peak_extra_bytes: peak memory of one run in a fresh process, less what was there before it; None: not measured.
    sizes: the case's numbers, such as {"n": 2048, "h": 576, "v": 49152}.
    load: the machine's 1-minute load average when timing began, beside `threads` of our own.
    skipped: implementation -> why this case has no record of it; the same in all records of a case.
    losses: in `train`, of each step of the first run.
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
                f"{self.implementation} on {self.case} has errors {self.errors}: check it before timing it"
            )
        if not 0 < self.q1_s <= self.median_s <= self.q3_s:
            raise ValueError(
                f"{self.implementation} on {self.case} has quartiles {self.q1_s, self.median_s, self.q3_s}"
            )


def save(measurements: list[Measurement], path: Path) -> None:
    """Writes the records as a JSON list, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([asdict(m) for m in measurements], indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load(path: Path) -> list[Measurement]:
    """The records of one JSON file; ValueError names a field that is missing (those with a default may) or unknown."""
    required = {f.name: f.default is f.default_factory is MISSING for f in fields(Measurement)}
    records = json.loads(path.read_text(encoding="utf-8"))
    for record in records:
        wrong = [name for name in record.keys() ^ required.keys() if required.get(name, True)]
        if wrong:
            raise ValueError(f"{path} does not hold measurements: fields {sorted(wrong)} differ")
    return [Measurement(**record) for record in records]


def quartiles(seconds: list[float]) -> list[float]:
    """The first, the median and the third; of one run, that one."""
    return statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times A B C A B C ..., so that a change of the machine's load hits all alike."""
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
    """Runs, checks, times (interleaved) and weighs every candidate; the wrong ones are named and left out.

    A candidate that is a text cannot run here: why. What has no record, the others' records name with the reason.
    check(name, outputs) returns what it compared or raises WrongResult. memory(name) is the peak in bytes.
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
    """Device, threads, versions, commit and date, as a Measurement has them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if "fastalign" not in versions:  # run from a checkout that is not installed
        import fastalign

        versions["fastalign"] = fastalign.__version__
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def cpu_name() -> str:
    """The processor's name, its cores, and the widest vectors torch uses on it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The checkout's commit, with a + where files that matter here differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "fastalign", "kernels", "csrc", "bench/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_extra_memory(run: Callable[[], object]) -> int:
    """Peak memory in bytes while `run` runs, less what is held before: on CUDA the allocator's, else resident set.

    Meant for a fresh process, in which nothing has been freed that `run` could use again unseen. SystemExit where the
    system does not let a peak be counted from here (Linux does).
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
        raise SystemExit("/proc/self/clear_refs cannot be written: a peak would count what was held before")
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def peak_resident(*, reset: bool = False) -> int:
    """The peak resident set of this process in bytes; with `reset`, the present one, from which a new peak counts.

    On CUDA it is the allocator's bytes instead.
    """
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()
    if reset and _reset_peak():
        return _status_bytes("VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if reset else _status_bytes("VmHWM")


def memory_in_fresh_process(suite: str, case: str, implementation: str) -> int | None:
    """`python -m bench memory ...` for one implementation: peak extra bytes, or None (said aloud) where it failed."""
    threads = torch.get_num_threads()
    command = [sys.executable, "-m", "bench", "memory", suite, case, implementation, "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        say(f"    memory of {implementation} not measured: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return int(done.stdout.split()[-1])


FRACTIONS = (16, 4)  # runs on 1/16, then 1/4 of the rows tell whether a whole one fits the limit


COMPILING_S = 40  # what a first run may take besides


def timed(run: Callable[[], object], limit_s: float = math.inf) -> float:
    """Seconds of the second run, as the first loads and compiles; of the first where that cannot explain them."""
    first = seconds_of(run)
    return first if first > COMPILING_S + 2 * limit_s else seconds_of(run)


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def too_slow(part: Callable[[int], Callable[[], object]], limit_s: float) -> str | None:
    """Why a whole run may take longer than the limit, None where it does not; part(16) is a run on 1/16 of the rows.

    Runs on few rows are not multiplied up: some take nearly as long as on all.
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
    """The candidates that can run here within `limit_s`; of the others, why not. Floors may take as long as they want.

    part(name, 16) is the candidate on 1/16 of the rows, part(name, 1) the one to measure.
    """
    candidates: dict[str, Callable[[], Outputs] | str] = {}
    for name in names:
        say(f"    trying {name} on some of the rows", same_line=True)
        try:
            allowed = math.inf if FLOOR in name else limit_s  # without a floor a table says little
            candidates[name] = too_slow(partial(part, name), allowed) or part(name, 1)
        except (Missing, BackendError) as reason:
            candidates[name] = str(reason)
        except Exception as error:  # a peer's fault must not end the others' run
            candidates[name] = f"it raised {type(error).__name__}: {' '.join(str(error).splitlines()[:1])[:200]}"
        if isinstance(candidates[name], str):
            say(f"    skipped {name}: {candidates[name]}")
    return candidates


def memory_of(suite: str, case: str, implementation: str, make: Callable[[str], Callable[[], object]]) -> int | None:
    """Peak extra bytes: on CUDA in this process, where the allocator counts exactly, elsewhere in a fresh one.

    make(implementation) is a candidate that holds no memory yet.
    """
    if torch.cuda.is_available():
        return peak_extra_memory(make(implementation))
    return memory_in_fresh_process(suite, case, implementation)


def say(text: str, *, same_line: bool = False) -> None:
    """Progress, on stderr; `same_line` is overwritten by the next, and left out where stderr is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="" if same_line else "\n", file=sys.stderr, flush=True)
    elif not same_line:
        print(text, file=sys.stderr, flush=True)


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _return_freed_memory() -> None:
    """What glibc's malloc keeps of freed memory would serve the run unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    """Sets this process's VmHWM to its present size (Linux: "5" to clear_refs); whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
