"""What an installed fastalign is: the wheel, the editable install, and the folder `kernels`."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import fastalign

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastalign"


def python(executable: str | Path, code: str, folder: Path) -> str:
    """What the code prints, in another process that runs outside the checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# A top-level import package named `kernels` breaks transformers and bitsandbytes, which take it for Hugging Face's.


def test_kernels_is_a_plain_folder():
    assert (ROOT / "kernels").is_dir()
    assert not list((ROOT / "kernels").rglob("__init__.py"))


def test_kernels_is_a_symlink_inside_the_package():
    entry = subprocess.run(
        ["git", "ls-files", "-s", "fastalign/kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert entry.startswith("120000 ") and entry.endswith("\tfastalign/kernels\n")
    assert (PACKAGE / "kernels").readlink() == Path("../kernels")


def test_the_installed_package_brings_no_top_level_package_of_that_name(tmp_path):
    code = "import importlib.util, fastalign, os; print(importlib.util.find_spec('kernels'), fastalign.__file__)"
    spec, file = python(sys.executable, code, tmp_path).split()
    assert spec == "None"
    assert Path(file).resolve() == PACKAGE / "__init__.py"  # the editable install of this checkout


def test_pytest_imports_test_files_by_path(pytestconfig):
    assert pytestconfig.getoption("importmode") == "importlib"
    assert not list((ROOT / "tests").rglob("__init__.py"))


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout. The CUDA kernels, whose compilation takes minutes, are left out."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--wheel-dir", folder, "--config-settings", f"build-dir={folder / 'build'}",
            "--config-settings", "cmake.define.FASTALIGN_CUDA=OFF", ROOT,
        ],
        check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("fastalign-*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "fastalign", "kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = {f"fastalign/{name}" if name.startswith("kernels/") else name for name in listed} - {"fastalign/kernels"}
    assert {"fastalign/py.typed", "fastalign/ops/segment_sum.py", "fastalign/cli/options.json"} < expected
    assert any(name.startswith("fastalign/recipes/") for name in expected)
    assert not expected - held
    assert [name for name in held if name.startswith("fastalign/_cpu.") and name.endswith((".so", ".pyd"))]
    assert {name.split("/")[0] for name in held} == {"fastalign", f"fastalign-{fastalign.__version__}.dist-info"}


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """The packages that fastalign needs are borrowed from this environment, since torch is large."""
    venv.create(tmp_path / "env", with_pip=False)
    executable = tmp_path / "env" / "bin" / "python"
    install = ["-m", "pip", "--python", executable, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, *install], check=True)
    (packages,) = tmp_path.glob("env/lib/*/site-packages")
    said = python(executable, "import fastalign; print(fastalign.__version__, fastalign.__file__)", tmp_path)
    assert said.split() == [fastalign.__version__, str(packages / "fastalign" / "__init__.py")]
    # Torch is not there yet: what follows imports nothing but the standard library.
    shown = subprocess.run(
        [tmp_path / "env" / "bin" / "fastalign", "--help"], cwd=tmp_path, env={**os.environ, "COLUMNS": "100"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown == (ROOT / "tests" / "cli" / "help.txt").read_text()
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = """
import fastalign, importlib.util, torch
from fastalign.ops.backends import cpu
hidden, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
expected = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
torch.testing.assert_close(fastalign.linear_logprobs(hidden, weight, targets, backend="cpu"), expected)
print(fastalign.__file__, cpu.describe()["built"], importlib.util.find_spec("kernels"))
"""
    file, *rest = python(executable, code, tmp_path).split()
    assert Path(file).is_relative_to(tmp_path) and rest == ["True", "None"]
