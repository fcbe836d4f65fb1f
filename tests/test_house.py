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
    {"ops", "stats"},
    {"fused", "data", "config", "report"},
    {"compat", "models", "objectives"},
    {"rollout", "fisher", "memory"},
    {"rewards"},
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
    "stats": {"numpy", "scipy"},
    "data": {"torch", "numpy", "datasets", "transformers", "pyarrow", "safetensors"},
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
    "fastalign.models.merging": "tests/cli/test_merge.py, which has runs to merge",
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


def test_the_table_of_levels_in_the_documentation_is_this_one():
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| ([^:|]*)", page, re.MULTILINE)
    documented = [set(re.findall(r"`(\w+)`", row)) for row in rows]
    assert documented == [{name for name in names if not name.startswith("_")} for names in LEVELS]


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
            if name.startswith("llama.cpp"):
                continue  # a project, and a file of it
            assert any(path.endswith("/" + name) for path in paths), f"{source} names {name}, which does not exist"


def test_the_trainer_only_wires():
    """One job: what grows belongs into a part of its own beside it."""
    tree = ast.parse(MODULES["fastalign.training.trainer"].read_text(encoding="utf-8"))
    (trainer,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert trainer.end_lineno is not None and trainer.end_lineno - trainer.lineno < 200


def test_public_names_are_documented():
    for name in set(fastalign.__all__) - {"__version__"}:
        assert (getattr(fastalign, name).__doc__ or "").strip(), f"fastalign.{name} has no docstring"


# The packages and modules whose public names users import.
PUBLIC = ["fastalign", *(f"fastalign.{name}" for name in ("ops", "losses", "reference", "compat.liger", "compat.trl"))]
PUBLIC += [f"fastalign.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py") if "lazy" in path.read_text()]


def public_definitions() -> Iterator[tuple[str, ast.AST]]:
    """(dotted name, definition) of each exported function and class, and of the public methods of these classes."""
    seen = {}
    for package in PUBLIC:
        module = importlib.import_module(package)
        listed = getattr(module, "__all__", None)
        for name in listed or [name for name in vars(module) if not name.startswith("_")]:
            value = getattr(module, name)
            home = getattr(value, "__module__", None) or ""
            if home in MODULES and (listed or home.startswith(package)):
                seen[home, value.__name__] = None
    for home, name in seen:
        body = ast.parse(MODULES[home].read_text(encoding="utf-8")).body
        for node in body:
            if getattr(node, "name", "") == name and not is_overload(node):
                yield f"{home}.{name}", node
                for method in node.body if isinstance(node, ast.ClassDef) else ():
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield f"{home}.{name}.{method.name}", method


def is_overload(node: ast.AST) -> bool:
    """Whether it is one of the signatures of a function, not the function."""
    return any("overload" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ()))


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What lies inside a function, without the functions that it defines."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield child
            yield from own_nodes(child)


def undocumented(node: ast.AST) -> list[str]:
    """What the docstring of a function or class must say and does not: its arguments or fields, its errors."""
    doc, functions, arguments = ast.get_docstring(node) or "", [node], []
    if isinstance(node, ast.ClassDef):
        methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
        functions = [methods[name] for name in ("__init__", "__post_init__") if name in methods]
        doc += "\n".join(ast.get_docstring(function) or "" for function in functions)
        if "__init__" not in methods:
            fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
            arguments = [field.target.id for field in fields if isinstance(field.target, ast.Name)]
    for function in functions:
        if isinstance(function, ast.FunctionDef) and function.name != "__post_init__":
            given = function.args
            named = [
                arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs) if arg.arg not in ("self", "cls")
            ]
            passed_on = [
                arg for arg in (given.vararg, given.kwarg) if arg and named
            ]  # (*args, **kwargs) of another call
            arguments = [arg.arg for arg in named + passed_on]
    described = re.findall(r"^ *((?:\*{0,2}\w+(?:, )?)+)(?: \(.*\))?: ", doc, re.MULTILINE)
    names = {name.strip("* ") for line in described for name in line.split(",")}
    missing = [name for name in arguments if name not in names] if len(arguments) > 1 else []
    raises = any(
        isinstance(inside, ast.Raise) and inside.exc for function in functions for inside in own_nodes(function)
    )
    return missing + ["Raises"] * (raises and "Raises:" not in doc)


def test_public_names_say_what_they_take_and_what_they_raise():
    """A docstring has a line for each of two or more arguments, and `Raises:` where the function itself raises."""
    definitions = dict(public_definitions())
    assert {"fastalign.losses.preference.dpo", "fastalign.training.preference.PreferenceTrainer"} <= definitions.keys()
    silent = {name: lacks for name, node in definitions.items() if (lacks := undocumented(node))}
    assert not silent, "\n".join(f"{name}: {', '.join(lacks)}" for name, lacks in silent.items())


def test_version_is_the_same_everywhere():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert fastalign.__version__ == version


# Security: SECURITY.md promises these

UNSAFE_CALLS = {
    "eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "pickle.load",
    "pickle.loads", "numpy.load", "np.load", "os.system", "os.popen", "marshal.loads", "shelve.open", "joblib.load",
}  # fmt: skip
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def unsafe(source: str) -> list[str]:
    """What in a source would run code that came with data: unpickling, YAML tags, remote code, eval, a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in UNSAFE_CALLS else []
            found += [f"{k.arg}=" for k in node.keywords if k.arg == "shell" and ast.unparse(k.value) != "False"]
            found += [f"{k.arg}=" for k in node.keywords if _remote(k.arg, k.value) or _pickles(k.arg, k.value)]
        elif isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            found += [f"{key}:" for key, value in zip(keys, node.values, strict=True) if _remote(key, value)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            found.append(str(node.module))
    return found


def _remote(name: object, value: ast.expr) -> bool:
    return name == "trust_remote_code" and ast.unparse(value) != "False"


def _pickles(name: object, value: ast.expr) -> bool:
    return (name, ast.unparse(value)) in {("allow_pickle", "True"), ("weights_only", "False")}


@pytest.mark.parametrize("path", [*MODULES.values(), *(ROOT / "examples").glob("*.py")], ids=str)
def test_nothing_that_came_with_data_is_run(path):
    # The one program that runs a model's code has locked itself in before; tests/evaluation/test_code.py tries it.
    allowed = ["exec"] if path == PACKAGE / "evaluation/sandbox.py" else []
    assert unsafe(path.read_text(encoding="utf-8")) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "torch.load(path)", "yaml.load(text, Loader)", "eval(text)",
        "load(path, trust_remote_code=True)", "options = {'trust_remote_code': given}", "np.load(p, allow_pickle=True)",
        "run(text, shell=True)",
    ],
)  # fmt: skip
def test_what_would_run_it_is_seen(source):
    assert unsafe(source)


def test_the_promises_name_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert len(named) > 8 and all((ROOT / name).is_file() for name in named)
