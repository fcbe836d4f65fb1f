"""Runs a model's code against an item's tests, in a process that can harm nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastalign.errors import ConfigError
from fastalign.evaluation import sandbox

SECONDS = 10  # of a program; after that it has failed
MEMORY = 2**30  # bytes of a program

# Where a continuation of a function ends: what begins at the left margin is no part of it any more.
_END = re.compile(r"\n(?=(?:class |def |if |print\(|#|@|import |from |```))")


class CodeResult(NamedTuple):
    """How a program ended.

    Attributes:
        passed: Whether it ran to its end without an error.
        reason: What failed; empty if it passed.
    """

    passed: bool
    reason: str


@cache
def isolation() -> str:
    """How code is locked in on this system: "landlock" or "namespaces"; "none" if it has neither."""
    return next(iter(sandbox.isolations()), "none")


def check_isolation(*, unsafe: bool) -> None:
    """Refuses to run a model's code where nothing can lock it in.

    Args:
        unsafe: Whether the user accepts that.

    Raises:
        ConfigError: The system has neither Landlock nor user namespaces, and `unsafe` is false.
    """
    if isolation() == "none" and not unsafe:
        raise ConfigError(
            "The suite holds code to run, and this system has neither Landlock nor user namespaces to lock it in: "
            "leave the code items out, or accept with --unsafe-code that a model's code runs with your rights."
        )


def code_of(answer: str) -> str:
    """The code of an answer: its first block between ```, or all of it if there is none."""
    block = re.search(r"```[^\n`]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return block[1] if block else answer


def continued(prompt: str, answer: str) -> str:
    """The code of a prompt and its plain continuation, up to where the prompt's function ends."""
    return prompt + _END.split(answer, maxsplit=1)[0]


def run_code(program: str, *, seconds: int = SECONDS, memory: int = MEMORY, how: str | None = None) -> CodeResult:
    """Runs a program in a process without network, with limits, that can write in an empty folder of its own alone.

    Args:
        program: Python code, the tests at its end.
        seconds: The most time it may take.
        memory: The most bytes it may use.
        how: "landlock", "namespaces" or "none"; None: what `isolation` finds.
    """
    token = secrets.token_hex(16)  # a program that ends itself early cannot say it
    with tempfile.TemporaryDirectory(prefix="fastalign-code-") as folder:
        task = {
            "program": program, "folder": str(Path(folder).resolve()), "memory": memory, "seconds": seconds,
            "isolation": how or isolation(), "token": token,
        }  # fmt: skip
        read, write = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", sandbox.__file__, str(write)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, pass_fds=(write,),
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        os.close(write)
        try:
            process.communicate(json.dumps(task).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return CodeResult(False, f"it ran for more than {seconds} seconds")
        finally:
            _end(process)
            with os.fdopen(read, "rb") as report:
                said = report.read(1000).decode(errors="replace")
    if said == token:
        return CodeResult(True, "")
    return CodeResult(False, said or f"it ended itself, with status {process.returncode}")


def _end(process: subprocess.Popen) -> None:
    """Ends a program with everything that it may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
