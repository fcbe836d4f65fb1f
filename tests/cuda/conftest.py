"""Builds csrc/cuda with g++ and cuda_emulation.h: as the extension `_cuda`, whose tensors then lie on the CPU, and as
stand-alone checks under sanitizers. What was built is kept in pytest's cache under a hash of its sources."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = [
    "-std=c++20", "-O1", "-pthread", "-fno-strict-aliasing", "-DFASTALIGN_EMULATE_CUDA", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas",
]  # fmt: skip
SANITIZERS = {"address": "address,undefined", "thread": "thread"}


def run(*command: object, timeout: float | None = None) -> subprocess.CompletedProcess:
    words = [str(part) for part in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)


def compiled(folder: Path, name: str, source: Path, csrc: Path, *flags: str) -> Path:
    """The object file of one source, from the cache if nothing it could include has changed."""
    command = ["g++", *FLAGS, *flags, f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{HERE}"]
    digest = hashlib.sha256(repr(command[1:-3]).encode())
    included = [*(csrc / "cuda").glob("*.h"), *HERE.glob("*.h"), csrc / "cuda" / f"{name.split('-')[0]}.cu"]
    for path in [source, *sorted(path for path in included if path.exists())]:
        digest.update(path.read_bytes())
    out = folder / f"{name}-{digest.hexdigest()[:16]}.o"
    if not out.exists():
        new = out.with_suffix(f".{os.getpid()}")  # pytest's processes may compile the same file at the same time
        built = run(*command, "-c", "-x", "c++", source, "-o", new)
        assert built.returncode == 0, built.stderr
        new.replace(out)
    return out


@pytest.fixture(scope="session")
def objects(pytestconfig) -> Path:
    return pytestconfig.cache.mkdir("cuda_emulation")


@pytest.fixture(scope="session")
def emulated(objects, tmp_path_factory):
    """The extension `_cuda`, compiled by g++: its kernels run on the CPU."""
    pybind11 = pytest.importorskip("pybind11")
    bindings = [
        f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-fvisibility=hidden",
        '-DFASTALIGN_CUDA_COMPILER="g++"', '-DFASTALIGN_CUDA_DEVICE="cpu"', "-O0",
    ]  # fmt: skip
    jobs = [(CSRC / "bindings_cuda.cpp", bindings)] + [(path, []) for path in sorted((CSRC / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(lambda job: compiled(objects, job[0].stem, job[0], CSRC, "-fPIC", *job[1]), jobs))
    library = tmp_path_factory.mktemp("emulated") / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    linked = run("g++", "-shared", "-pthread", *built, "-o", library)
    assert linked.returncode == 0, linked.stderr
    spec = importlib.util.spec_from_file_location("_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda(emulated, monkeypatch):
    """fastalign.ops.backends.cuda on the emulated extension."""
    from fastalign.ops.backends import cuda

    monkeypatch.setattr(cuda, "module", emulated)
    return cuda


@pytest.fixture(scope="session")
def sanitized(objects, tmp_path_factory):
    """A function that builds check_<op>.cpp, which includes csrc/cuda/<op>.cu, under a sanitizer and runs it.

    `fault` (old, new) is planted in a copy of the sources first, in the file that holds `old`, once.
    """

    def check(op: str, sanitizer: str, fault: tuple[str, str] | None = None) -> subprocess.CompletedProcess:
        csrc = CSRC
        if fault:
            csrc = tmp_path_factory.mktemp("faulty") / "csrc"
            shutil.copytree(CSRC / "cuda", csrc / "cuda")
            plant(csrc / "cuda", op, *fault)
        flags = [f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all", "-g1", *["-w"] * bool(fault)]
        if sanitizer == "address":
            flags += ["-fsanitize-sections=cuda_shared", "-O0"]  # optimising would take longer than it saves
        built = compiled(objects, f"{op}-{sanitizer}", HERE / f"check_{op}.cpp", csrc, *flags)
        program = tmp_path_factory.mktemp("check") / op
        linked = run("g++", "-pthread", *flags, built, "-o", program)
        assert linked.returncode == 0, linked.stderr
        return run(program, timeout=60)

    return check


def plant(folder: Path, op: str, old: str, new: str) -> None:
    """Replace `old`, which stands once, in the op's source or a header."""
    for path in (folder / f"{op}.cu", folder / "device.h", folder / "tile.h"):
        text = path.read_text(encoding="utf-8")
        if old in text:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
            path.write_text(text.replace(old, new), encoding="utf-8")
            return
    raise AssertionError(f"{old!r} stands in none of {op}.cu, device.h and tile.h")
