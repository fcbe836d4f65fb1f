"""The house rules: what may import what, how long a file may be, and what the package is made of."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastalign

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastalign"

# From the bottom to the top. A module imports from lower rows only, and packages (ops, losses, ...) from themselves.
LAYERS = [
    {"errors", "_cpu", "_cuda"},
    {"reference", "kernels"},
    {"losses"},
    {"ops"},
    {
        "fused",
        "packing",
        "linear",
        "body",
        "varlen",
        "cpu_attention",
        "formats",
        "rows",
        "preflight",
        "charts",
        "runfolder",
        "fisher_bytes",
    },
    {"compat", "attention", "data", "models", "report", "config", "callbacks", "evaluation"},
    {"scoring", "objectives", "texts", "fisher_file"},
    {"memory", "reference_logprobs", "collate", "fisher_head"},
    {"fisher"},
    {"regularizers"},
    {"replay", "layerwise", "teachers"},
    {"trainer"},
    {"distillation"},
    {"run", "tax", "taxpage"},
    {"cli"},
    {"recipes"},  # data and the scripts that made it; nothing imports it
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# What these may import beside the standard library and fastalign.
ONLY = {name: {"torch"} for name in ("errors", "reference", "ops", "losses", "fused", "packing", "linear")}
ONLY["kernels"] = {"torch", "triton"}
# Not on every machine: imported where they are used, never when fastalign is.
OPTIONAL = {"bitsandbytes", "flash_attn", "gguf", "liger_kernel", "triton", "trl"}
MAX_LINES = 450


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module under fastalign, kernels included."""
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def layer_name(module: str) -> str:
    """The name in LAYER of a dotted module: `fastalign.ops.tiles` -> `ops`; nothing for `fastalign` itself."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether imported with the file) of each import; `from fastalign import x` is fastalign.x."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path} imports relatively"
                inside = [f"fastalign.{alias.name}" for alias in child.names]
                yield from ((name, at_top) for name in (inside if child.module == "fastalign" else [child.module]))
            yield from visit(child, at_top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    return visit(ast.parse(path.read_text(encoding="utf-8")), True)


def test_every_module_has_a_layer():
    unlisted = {layer_name(module) for module in MODULES} - LAYER.keys() - {""}
    assert not unlisted, f"{sorted(unlisted)} must stand in LAYERS at the top of this file"
    assert {"fastalign.ops.tiles", "fastalign.losses.preference", "fastalign.trainer"} <= MODULES.keys()


@pytest.mark.parametrize("module", [module for module in MODULES if layer_name(module)])
def test_nothing_lower_imports_anything_higher(module):
    own = layer_name(module)
    for imported, _ in imports(MODULES[module]):
        name = layer_name(imported)
        if imported.split(".")[0] != "fastalign" or name == "__version__":
            continue
        assert name in LAYER, f"{module} imports {imported}; import from the module that defines it"
        below = LAYER[name] < LAYER[own] or name == own != "kernels"  # kernels never import one another
        assert below, f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("module", MODULES)
def test_what_comes_from_elsewhere(module):
    own = layer_name(module)
    for imported, at_top in imports(MODULES[module]):
        top = imported.split(".")[0]
        if top in sys.stdlib_module_names or top == "fastalign":
            continue
        assert own not in ONLY or top in ONLY[own], f"{module} imports {top}"
        if own != "kernels":
            assert not (at_top and top in OPTIONAL), f"{module} imports {top} at its top; not every machine has it"
        assert top not in ("trl", "liger_kernel") or own == "compat", f"{module} imports {top}"


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_short(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_public_names_are_documented():
    for name in set(fastalign.__all__) - {"__version__"}:
        assert (getattr(fastalign, name).__doc__ or "").strip(), f"fastalign.{name} has no docstring"


def test_version_is_the_same_everywhere():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert fastalign.__version__ == version


# A top-level import package named `kernels` breaks transformers, which probes for Hugging Face's: hence these three.


def test_kernels_is_a_plain_folder():
    assert (ROOT / "kernels").is_dir()
    assert not list((ROOT / "kernels").rglob("__init__.py"))


def test_kernels_is_a_symlink_inside_the_package():
    entry = subprocess.run(
        ["git", "ls-files", "-s", "fastalign/kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert entry.startswith("120000 ") and entry.endswith("\tfastalign/kernels\n")
    assert (PACKAGE / "kernels").readlink() == Path("../kernels")


def test_pytest_imports_test_files_by_path(pytestconfig):
    assert pytestconfig.getoption("importmode") == "importlib"
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(tmp_path):
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--wheel-dir", tmp_path, "--config-settings", f"build-dir={tmp_path / 'build'}", ROOT,
        ],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("fastalign-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "fastalign", "kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = {f"fastalign/{name}" if name.startswith("kernels/") else name for name in listed} - {"fastalign/kernels"}
    assert {"fastalign/py.typed", "fastalign/ops/tiles.py"} < expected
    assert any(name.startswith("fastalign/recipes/") for name in expected)
    assert not expected - held
    assert [name for name in held if name.startswith("fastalign/_cpu.") and name.endswith((".so", ".pyd"))]
    assert {name.split("/")[0] for name in held} == {"fastalign", f"fastalign-{fastalign.__version__}.dist-info"}
