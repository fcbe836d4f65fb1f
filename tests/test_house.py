"""The house rules: what may import what, how long a file may be, and what the package is made of."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastalign

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastalign"

# From the bottom to the top: a module imports from lower rows, and from its own package. Packages of one row do not
# know each other. `errors` may be imported by everything.
LEVELS = [
    {"errors", "options", "files", "_cpu", "_cuda"},
    {"lazy", "reference", "losses", "kernels"},
    {"ops"},
    {"fused", "data", "config", "report"},
    {"compat", "models", "objectives"},
    {"rollout", "fisher", "memory"},
    {"evaluation"},
    {"regularizers"},
    {"training"},
    {"cli", "recipes"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
# What these may import beside the standard library and fastalign, with the file or inside a function.
ONLY = {name: {"torch"} for name in ("reference", "losses", "ops", "fused")}
ONLY |= {"errors": set(), "options": set(), "lazy": set(), "files": {"safetensors", "torch", "numpy"}}
ONLY |= {
    "kernels": {"torch", "triton"},
    "data": {"torch", "numpy", "datasets", "transformers", "pyarrow"},
    "config": {"torch", "transformers"},
    "report": {"jinja2", "markupsafe", "matplotlib", "numpy"},
}
# The only modules that may import these.
ALONE = {
    "peft": {"fastalign.models.adapters"},
    "bitsandbytes": {"fastalign.models.quantization"},
    "trl": set(),
    "liger_kernel": set(),
}
# Not on every machine: imported where they are used, never when fastalign is.
OPTIONAL = {"bitsandbytes", "flash_attn", "gguf", "liger_kernel", "triton", "trl"}
# Modules without a test file of their own, and where they are tested.
TESTED_ELSEWHERE: dict[str, str] = {
    "fastalign.ops.backends.cuda": "tests/cuda, which compiles the kernels for the CPU to run them",
}
MAX_LINES = 450


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module under fastalign, kernels included."""
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def package_name(module: str) -> str:
    """The name in LEVEL of a dotted module: `fastalign.ops.segment_sum` -> `ops`; nothing for `fastalign` itself."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(dotted module, imported name or "", whether imported with the file) of each import of a file."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[tuple[str, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, "", at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, f"{path} imports relatively"
                for alias in child.names:
                    inside = f"{child.module}.{alias.name}"
                    yield (inside, "", at_top) if inside in MODULES else (child.module, alias.name, at_top)
            yield from visit(child, at_top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    return visit(ast.parse(path.read_text(encoding="utf-8")), True)


def test_every_module_has_a_level():
    unlisted = {package_name(module) for module in MODULES} - LEVEL.keys() - {"", "__main__"}
    assert not unlisted, f"{sorted(unlisted)} must stand in LEVELS at the top of this file"
    assert {"fastalign.ops.segment_sum", "fastalign.losses.preference", "fastalign.training.trainer"} <= MODULES.keys()


def test_few_modules_lie_directly_in_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 7


@pytest.mark.parametrize("module", [module for module in MODULES if package_name(module)])
def test_nothing_lower_imports_anything_higher(module):
    own = package_name(module)
    for imported, name, _ in imports(MODULES[module]):
        if imported == "fastalign" and name in ("_cpu", "_cuda", "__version__"):
            continue
        other = package_name(imported)
        if imported.split(".")[0] != "fastalign" or other == "errors":
            continue
        assert other in LEVEL, f"{module} imports {imported}; import from the module that defines it"
        below = LEVEL[other] < LEVEL[own] or other == own != "kernels"  # kernels never import one another
        assert below, f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("package", sorted(set(map(package_name, MODULES)) - {""}))
def test_no_circle_inside_a_package(package):
    inside = {module for module in MODULES if package_name(module) == package and module != f"fastalign.{package}"}
    graph = {module: {m for m, _, _ in imports(MODULES[module]) if m in inside} - {module} for module in inside}
    while leaves := {module for module, needed in graph.items() if not needed & graph.keys()}:
        graph = {module: needed for module, needed in graph.items() if module not in leaves}
    assert not graph, f"these modules import each other in a circle: {sorted(graph)}"


@pytest.mark.parametrize("path", [*MODULES.values(), *(ROOT / "bench").rglob("*.py")], ids=str)
def test_no_private_name_is_imported(path):
    for imported, name, _ in imports(path):
        native = name in ("_cpu", "_cuda") or imported == "__future__"
        ours = imported.split(".")[0] in ("fastalign", "bench")
        assert native or not ours or not name.startswith("_") or name == "__version__", f"{path} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_what_comes_from_elsewhere(module):
    own, declared = package_name(module), declared_dependencies()
    for imported, _, at_top in imports(MODULES[module]):
        top = imported.split(".")[0]
        if top in sys.stdlib_module_names or top == "fastalign":
            continue
        assert own not in ONLY or top in ONLY[own], f"{module} imports {top}"
        assert module in ALONE.get(top, {module}), f"{module} imports {top}"
        if own != "kernels":
            assert not (at_top and top in OPTIONAL), f"{module} imports {top} at its top; not every machine has it"
        assert top in OPTIONAL or top in declared, f"{module} imports {top}, which pyproject.toml does not declare"


def declared_dependencies() -> set[str]:
    """The import names of what pyproject.toml says that fastalign needs."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block
    names = re.findall(r'"([A-Za-z0-9_.-]+)', block[1])
    return {{"pyyaml": "yaml"}.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize("module", [m for m in MODULES if package_name(m) not in ("", "kernels", "recipes")])
def test_every_module_has_its_tests(module):
    path = MODULES[module]
    if path.name == "__init__.py":
        return
    expected = ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name}")
    assert expected.exists() or module in TESTED_ELSEWHERE, f"{expected.relative_to(ROOT)} is missing"
    assert not (expected.exists() and module in TESTED_ELSEWHERE), f"{module} has tests: take it off the list"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_no_module_has_the_name_of_a_public_function(path):
    """Else a lazy package hands out the module where the function is asked for. `ops` is not lazy."""
    package = importlib.import_module(f"fastalign.{path.parent.name}")
    modules = {p.stem for p in path.parent.glob("*.py")} | {p.name for p in path.parent.iterdir() if p.is_dir()}
    assert path.parent.name == "ops" or not modules & set(getattr(package, "__all__", ()))


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *sorted(PACKAGE.glob("*/__init__.py"))], ids=str)
def test_type_checkers_see_what_a_lazy_package_exports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tables = [
        node.args[1] for node in ast.walk(tree) if isinstance(node, ast.Call) and "lazy" in ast.unparse(node.func)
    ]
    for table in tables:
        at_runtime = ast.literal_eval(table)
        blocks = [node for node in tree.body if isinstance(node, ast.If)]
        names = [(alias.name, node.module) for block in blocks for node in block.body for alias in node.names]
        stars = {(module.split(".")[-1], module) for name, module in names if name == "*"}
        families = {(name.split("_")[0], module) for name, module in at_runtime.items() if name.endswith("*")}
        assert stars == families  # `fused_linear_*` of the table is `from fastalign.fused import *` to a type checker
        assert {(name, module) for name, module in names if name != "*"} == {
            (name, module) for name, module in at_runtime.items() if not name.endswith("*")
        }


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_short(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_files_that_sources_name_are_there():
    """A comment that sends the reader to a file that was renamed misleads more than none."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    paths = {"/" + path for path in listed}
    sources = [path for path in listed if re.match(r"(csrc|kernels|fastalign)/.*\.(py|pyi|h|cpp|cu)$", path)]
    assert len(sources) > 200
    for source in sources:
        text = (ROOT / source).read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w.*<>/-])(?:[\w.-]+/)*[\w-]+\.(?:py|h|cpp|cu|md|j2)\b(?!\()", text):
            assert any(path.endswith("/" + name) for path in paths), f"{source} names {name}, which does not exist"


def test_the_trainer_only_wires():
    """One job: what grows belongs into a part of its own beside it."""
    tree = ast.parse(MODULES["fastalign.training.trainer"].read_text(encoding="utf-8"))
    (trainer,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert trainer.end_lineno is not None and trainer.end_lineno - trainer.lineno < 200


def test_public_names_are_documented():
    for name in set(fastalign.__all__) - {"__version__"}:
        assert (getattr(fastalign, name).__doc__ or "").strip(), f"fastalign.{name} has no docstring"


def test_version_is_the_same_everywhere():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert fastalign.__version__ == version
