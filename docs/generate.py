"""What pages say of the sources: tables of options, losses, regularisers and commands, and the text of the recipes.

A page of `docs/` holds a line such as `<!-- generated: options PreferenceConfig -->`. mkdocs calls `on_page_markdown`
(see `hooks` in mkdocs.yml), which puts the table in its place, so no generated text is committed. A link in front of
the mark is for readers of the repository, and is replaced too. The sources are read with `ast`: nothing of fastalign is
imported, and the site builds without torch.

Definitions are looked for by name in the whole package, so that a file that moves needs no change here. What cannot be
found, or has no formula, ends the build with `ReferenceProblem`.
"""

# ruff: noqa: RUF001  formulas have Greek letters

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastalign"
MARK = re.compile(r"^(?:\[.*\]\(.*\) )?<!-- generated: (\w+)((?: [\w.-]+)*) -->$", re.MULTILINE)
# A picture outside of docs/, by its path from the page, as the repository's own viewer wants it.
PICTURE = re.compile(r"\]\((\.\./[^)\s]*(?:bench|fastalign)/[^)\s]+\.png)\)")
# A paragraph of a loss's docstring that holds one of these is its formula.
FORMULA = re.compile(r"log s\(|\^2|exp\(|max\(|\bs\(")
GREEK = {
    r"\bs\(": "σ(", r"\bbeta\b": "β", r"\balpha\b": "α", r"\btau\b": "τ", r"\bdelta\b": "δ", r"\bgamma\b": "γ",
    r"\beps\b": "ε", r"\^2": "²",
}  # fmt: skip


class ReferenceProblem(Exception):
    """A page asks for something that the sources do not hold."""


def on_files(files, config):
    """Pictures of the repository that lie outside of docs/ join the site. mkdocs calls this once."""
    from mkdocs.structure.files import File

    for page in files.documentation_pages():
        for link in PICTURE.findall(expand(Path(page.abs_src_path).read_text(encoding="utf-8"))):
            path = (Path(page.abs_src_path).parent / link).resolve()
            uri = f"pictures/{path.relative_to(ROOT).as_posix()}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """The page with every mark replaced by its table. mkdocs calls this for each page."""
    folder = Path(page.file.abs_src_path).parent
    top = "../" * page.file.src_uri.count("/")

    def picture(link: re.Match) -> str:
        path = (folder / link[1]).resolve()
        return f"]({top}pictures/{path.relative_to(ROOT).as_posix()})"

    return PICTURE.sub(picture, expand(markdown))


def expand(markdown: str) -> str:
    """`markdown` with every `<!-- generated: KIND NAME -->` line replaced by what KIND makes."""

    def table(mark: re.Match) -> str:
        kind, names = mark[1], mark[2].split()
        if kind not in KINDS:
            raise ReferenceProblem(f"There is no generated table {kind!r}; there are {', '.join(KINDS)}.")
        return KINDS[kind](*names)

    return MARK.sub(table, markdown)


# The sources


@cache
def sources() -> dict[Path, ast.Module]:
    """Every module of the package, parsed; `fastalign/kernels` is a link to the Triton kernels and is left out."""
    paths = (path for path in sorted(PACKAGE.rglob("*.py")) if "kernels" not in path.relative_to(PACKAGE).parts)
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def definition(name: str, kind: type[ast.ClassDef] | type[ast.FunctionDef], folder: str = "") -> ast.AST:
    """The class or function of that name at the top of some module, below `folder`."""
    for path, module in sources().items():
        if path.is_relative_to(PACKAGE / folder):
            for node in module.body:
                if isinstance(node, kind) and node.name == name:
                    return node
    raise ReferenceProblem(f"No {kind.__name__} {name!r} is defined at the top of a module of fastalign/{folder}.")


def assigned(name: str) -> ast.expr | None:
    """What the module-level `name` is set to, wherever that is; None if it is nowhere."""
    for module in sources().values():
        for node in module.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node.value
    return None


def entries(name: str) -> dict[str, ast.expr]:
    """Key -> value of a module-level dict with strings for keys."""
    node = assigned(name)
    if not isinstance(node, ast.Dict):
        raise ReferenceProblem(f"{name} is not a dict literal at the top of a module.")
    return {key.value: value for key, value in zip(node.keys, node.values, strict=True)}


def first_sentence(node: ast.AST) -> str:
    """Of a docstring, as one line."""
    doc = ast.get_docstring(node) or ""
    return " ".join(doc.split("\n\n")[0].split())


def text(node: ast.expr | None) -> str:
    """A string expression of the sources: constants joined, names of tables as their keys."""
    if node is None:
        return ""
    if isinstance(node, ast.JoinedStr):  # what it is filled with is known when it runs, not here
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    names = {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}
    tables = {name: list(entries(name)) for name in names}
    return str(eval(compile(ast.Expression(node), "<docs>", "eval"), {"__builtins__": {}}, tables))


def rows(*lines: tuple[str, ...]) -> str:
    """A table; the first line is its head."""
    escaped = [[cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines]
    head, *body = ["| " + " | ".join(line) + " |" for line in escaped]
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *body])


# Options: the fields of a dataclass


def choices(name: re.Match) -> str:
    """The strings of an alias such as `Divergence = Literal[...]`, which mean more to a reader than its name."""
    value = assigned(name[0])
    if not (isinstance(value, ast.Subscript) and getattr(value.value, "id", "") == "Literal"):
        return name[0]
    return " | ".join(map(ast.unparse, getattr(value.slice, "elts", [value.slice])))


def options(name: str) -> str:
    """The fields that a configuration class adds, with type, default and the sentence of `--help`."""
    lines = [("option", "type", "default", "meaning")]
    for field in definition(name, ast.ClassDef).body:
        if not isinstance(field, ast.AnnAssign):
            continue
        default, help_text = field.value, None
        if isinstance(default, ast.Call) and getattr(default.func, "id", "") == "help_field":
            default, help_text = default.args[:2]
        elif field.value is not None:  # not shown, as in `--help`
            continue
        shown = "required" if default is None else f"`{ast.unparse(default)}`"
        kind = re.sub(r"\w+", choices, ast.unparse(field.annotation)).replace(" | ", " or ")  # a bar would end the cell
        lines.append((f"`{field.target.id}`", f"`{kind}`", shown, text(help_text)))
    if len(lines) == 1:
        raise ReferenceProblem(f"{name} has no fields.")
    return rows(*lines)


# Losses


class Loss(NamedTuple):
    """A row of the table of losses."""

    name: str
    function: ast.FunctionDef
    averaged: bool
    aliases: tuple[str, ...]

    @property
    def parameters(self) -> list[str]:
        """Names of the arguments that are log-probabilities."""
        return [argument.arg for argument in self.function.args.args]

    @property
    def reference(self) -> bool:
        """Whether it takes log-probabilities of a reference."""
        return any(name.startswith("ref_") for name in self.parameters)

    @property
    def options(self) -> dict[str, str]:
        """Name and default of its keyword-only arguments."""
        arguments = self.function.args
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        return {argument.arg: ast.unparse(default) for argument, default in pairs if default is not None}


def losses(table: str) -> list[Loss]:
    """The losses that a table names: `PAIRWISE` or `UNPAIRED`."""
    found = []
    for name, value in entries(table).items():
        function, flags = value, {}
        if isinstance(value, ast.Call):  # a row with more than the function
            function = value.args[0]
            flags = {keyword.arg: ast.literal_eval(keyword.value) for keyword in value.keywords}
        if not isinstance(function, ast.Attribute):
            raise ReferenceProblem(f"The row of {name!r} in {table} does not begin with `module.function`.")
        found.append(Loss(
            name, definition(function.attr, ast.FunctionDef, "losses"), flags.get("averaged", False),
            flags.get("aliases", ()),
        ))  # fmt: skip
    return found


def formula(loss: Loss) -> str:
    """The formula in a loss's docstring, with Greek letters."""
    for paragraph in (ast.get_docstring(loss.function) or "").split("\n\n"):
        line = " ".join(paragraph.split()).replace("`", "")
        if FORMULA.search(line):
            line = line.removeprefix("L = ")
            for pattern, letter in GREEK.items():
                line = re.sub(pattern, letter, line)
            return line
    raise ReferenceProblem(f"The docstring of the loss {loss.name!r} has no paragraph that is its formula.")


def papers(loss: Loss) -> str:
    """Links to the papers that a loss's docstring names."""
    doc = " ".join((ast.get_docstring(loss.function) or "").split())
    found = re.findall(r"([A-Z][\w'’]+(?: & [A-Z]\w+)?(?: et al\.)? \d{4})[^()]{0,9}arXiv:(\d{4}\.\d{5})", doc)
    if not found:
        raise ReferenceProblem(
            f"The docstring of the loss {loss.name!r} names no paper as 'Author et al. 2024, arXiv:'."
        )
    return ", ".join(f"[{author}](https://arxiv.org/abs/{number})" for author, number in dict.fromkeys(found))


def loss_table(table: str) -> str:
    """Name, formula, paper, reference, averages and options of each loss."""
    lines = [("loss", "formula", "paper", "reference", "averaged", "options")]
    for loss in losses(table):
        given = ", ".join(f"`{name}={value}`" for name, value in loss.options.items())
        lines.append((
            f"[`{loss.name}`](#fastalign.losses.{loss.function.name})", f"`{formula(loss)}`", papers(loss),
            "yes" if loss.reference else "no", "yes" if loss.averaged else "no", given,
        ))  # fmt: skip
    return rows(*lines)


def aliases() -> str:
    """Names of other libraries that mean one of the losses."""
    lines = [("name", "is")]
    lines += [(f"`{alias}`", f"`{loss.name}`") for loss in losses("PAIRWISE") for alias in loss.aliases]
    return rows(*lines)


def loss_functions() -> str:
    """A mkdocstrings block for every function behind a loss."""
    names = dict.fromkeys(loss.function.name for table in ("PAIRWISE", "UNPAIRED") for loss in losses(table))
    return "\n\n".join(f"::: fastalign.losses.{name}\n    options:\n      heading_level: 3" for name in names)


def fused_calls() -> str:
    """Which `fused_linear_*` there are, and the loss of each."""
    lines = [("call", "loss", "reference", "options of its own")]
    for loss in [*losses("PAIRWISE"), *losses("UNPAIRED")]:
        given = ", ".join(f"`{option}={value}`" for option, value in loss.options.items())
        link = f"[`{loss.name}`](losses.md#fastalign.losses.{loss.function.name})"
        lines.append((f"`fused_linear_{loss.name}`", link, "yes" if loss.reference else "no", given))
    return rows(*lines)


# Regularisers


def regularizers() -> str:
    """What configuration files call each regulariser."""
    lines = [("name in a configuration", "class", "what it does")]
    for name, value in entries("REGULARIZERS").items():
        kind = value.value.partition(":")[2]  # of `module:class`
        said = first_sentence(definition(kind, ast.ClassDef))
        lines.append((f"`{name}`", f"[`{kind}`](#fastalign.{kind})", said))
    return rows(*lines)


# The command line


def commands() -> dict[str, list[ast.Call]]:
    """Command ("data check") -> its `add_argument` calls."""
    found: dict[str, list[ast.Call]] = {}
    for path, module in sources().items():
        if "cli" in path.relative_to(PACKAGE).with_suffix("").parts:
            for function in (node for node in module.body if isinstance(node, ast.FunctionDef)):
                _commands_of(function, path.stem, found)
    return found


def _commands_of(function: ast.FunctionDef, stem: str, found: dict[str, list[ast.Call]]) -> None:
    parsers = {"parser": stem} if function.name == "add" else {}  # by the name of a variable
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            call = node.value
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_parser":
                name = call.args[0].value if isinstance(call.args[0], ast.Constant) else None
                above = parsers.get(_root(call.func))
                parsers[node.targets[0].id] = f"{above} {name}" if above else name
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            name = parsers.get(_root(node.func))
            if name:
                found.setdefault(name, []).append(node)


def _root(node: ast.expr) -> str:
    """The variable that a chain of attributes and calls begins with."""
    while not isinstance(node, ast.Name):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id


def command(*words: str) -> str:
    """The arguments of one command."""
    name, known = " ".join(words), commands()
    if name not in known:
        raise ReferenceProblem(f"There is no command {name!r} with arguments; there are {', '.join(sorted(known))}.")
    lines = [("argument", "meaning")]
    for call in known[name]:
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        default = ast.unparse(keywords["default"]) if "default" in keywords else "none"
        meaning = text(keywords.get("help")).replace("%(default)s", default.strip("'\""))
        flags = ", ".join(f"`{argument.value}`" for argument in call.args)
        if "metavar" in keywords:
            flags += f" `{text(keywords['metavar'])}`"
        lines.append((flags, meaning))
    return rows(*lines)


# Recipes


def recipe(name: str) -> str:
    """The README of a recipe that ships with fastalign, and its options, for a page in docs/recipes."""
    folder = PACKAGE / "recipes" / name
    if not (folder / "README.md").exists():
        raise ReferenceProblem(f"There is no fastalign/recipes/{name}/README.md.")

    def link(found: re.Match) -> str:
        mark, label, target = found.groups()
        if target.startswith(("http", "#")):
            return found[0]
        if mark:
            return f"![{label}](../../fastalign/recipes/{name}/{target})"
        if target.endswith("/README.md"):  # of another recipe, which has a page too
            return f"[{label}]({Path(target).parent.name}.md)"
        return f"`fastalign/recipes/{name}/{target}`"  # other files are not part of the site

    readme = (folder / "README.md").read_text(encoding="utf-8")
    page = re.sub(r"(!?)\[([^\]]*)\]\(([^)]+)\)", link, readme)
    options = folder / "recipe.yaml"
    if options.exists():
        page += f"\n## Options\n\n```yaml\n{options.read_text(encoding='utf-8')}```\n"
    return page


KINDS: dict[str, Callable[..., str]] = {
    "options": options, "losses": loss_table, "aliases": aliases, "loss_functions": loss_functions,
    "fused": fused_calls, "regularizers": regularizers, "command": command,
    "recipe": recipe,
}  # fmt: skip


def requirements() -> Iterator[str]:
    """The packages of the extra `docs`; installing the extra itself would bring torch."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield from project["optional-dependencies"]["docs"]


if __name__ == "__main__":
    if sys.argv[1:] == ["--requirements"]:
        print("\n".join(requirements()))
    else:
        print(expand(Path(sys.argv[1]).read_text(encoding="utf-8")))
