"""Imports run one way, and one file alone knows what a method's name means.

Both are read from the source. An import counts wherever it stands: at the top, inside a function, under
`if TYPE_CHECKING`, or as `importlib.import_module("...")`.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ttt_harness
from ttt_harness.methods import METHODS, SETTINGS

FOLDER = Path(ttt_harness.__file__).parent

# The rule: a package, or a module of the top folder, imports from its own line and from lines above it.
LAYERS = (
    (
        "errors",
        "extras",
        "patches",
        "locks",
        "terminal",
        "methods",
        "records",
        "config",
        "stated",
        "files",
        "statistics",
        "embedded",
        "plugin",
    ),
    ("tuned",),
    ("data",),
    ("training", "adapters"),
    ("serving",),
    ("run",),
    ("cluster",),
    ("harness",),
    ("plugin",),
    ("report",),
    ("sweep",),
    ("tune",),
    ("estimate",),
    ("cli",),
    ("demo",),
)
# Reports are read where neither torch nor vLLM nor lm-eval is installed.
REPORT_IMPORTS = {"methods", "records", "errors", "terminal", "statistics", "tuned"}
# Names what users import from anywhere in the package, and loads it on first use.
FACE = "ttt_harness"


@cache
def modules() -> dict[str, ast.Module]:
    """The syntax tree of each module of the package, by the module's name."""
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        parts = path.relative_to(FOLDER.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported_names(module: str, tree: ast.Module) -> Iterator[str]:
    """The dotted names that a module asks for: of modules, or of something in one."""
    package = (
        module if (FOLDER.parent / module.replace(".", "/") / "__init__.py").exists() else module.rpartition(".")[0]
    )
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                yield from (f"{base}.{alias.name}" for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


@cache
def imports() -> set[tuple[str, str]]:
    """The pairs (importer, imported) of modules of the package."""
    pairs = set()
    for module, tree in modules().items():
        for name in imported_names(module, tree):
            target = name if name in modules() else name.rpartition(".")[0]
            if target in modules() and target != module and FACE not in (module, target):
                pairs.add((module, target))
    return pairs


def room(module: str) -> str:
    """The package in which a module lies, or the module itself where it lies in the top folder."""
    return module.split(".")[1]


def circles(edges: set[tuple[str, str]]) -> list[set[str]]:
    """The sets of names that reach each other."""
    after: dict[str, set[str]] = {}
    for one, other in edges:
        after.setdefault(one, set()).add(other)

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for name in after.get(waiting.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return seen

    reach = {name: reached(name) for name in after}
    found: list[set[str]] = []
    for name in sorted(reach):
        if name in reach[name] and not any(name in circle for circle in found):
            found.append({other for other in reach[name] if name in reach.get(other, ())})
    return found


def breaks_the_rule(importer: str, imported: str) -> bool:
    one, other = room(importer), room(imported)
    if one == other:
        return False
    if one == "report":
        return other not in REPORT_IMPORTS
    rank = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
    return rank[other] > rank[one]


def method_names_in(tree: ast.Module) -> Iterator[str]:
    """The expressions of a module that ask what a method's name means, or hold a table by such names."""
    names = set(METHODS) | set(SETTINGS)

    def is_name(node: ast.expr) -> bool:
        return isinstance(node, ast.Constant) and node.value in names

    def is_part(call: ast.Call, attribute: str) -> bool:
        parts = [node.value for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.Constant)]
        start = attribute.endswith("prefix") or attribute == "startswith"
        return any(part and (n.startswith(part) if start else n.endswith(part)) for part in parts for n in names)

    for node in ast.walk(tree):
        match node:
            case ast.Compare(ops=[ast.Eq() | ast.NotEq()]):
                found = is_name(node.left) or is_name(node.comparators[0])
            case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[ast.Tuple() | ast.List() | ast.Set() as among]):
                found = any(map(is_name, among.elts))
            case ast.MatchValue():
                found = is_name(node.value)
            case ast.Dict():  # one key may be that of results, "ttt"
                found = sum(key is not None and is_name(key) for key in node.keys) > 1
            case ast.Call(
                func=ast.Attribute(attr="startswith" | "endswith" | "removeprefix" | "removesuffix" as called)
            ):
                found = is_part(node, called)
            case _:
                found = False
        if found:
            yield ast.unparse(node)


def test_every_module_has_a_place() -> None:
    placed = {name for layer in LAYERS for name in layer}
    assert {room(module) for module in modules() if module != FACE} <= placed


def test_imports_run_one_way() -> None:
    assert {pair for pair in imports() if breaks_the_rule(*pair)} == set()


def test_no_files_import_each_other() -> None:
    assert circles(imports()) == []


def test_no_packages_import_each_other() -> None:
    rooms = {(room(one), room(other)) for one, other in imports()}
    assert circles({(one, other) for one, other in rooms if one != other}) == []


def test_one_file_knows_what_a_methods_name_means() -> None:
    asking = {module: found for module, tree in modules().items() if (found := list(method_names_in(tree)))}
    assert set(asking) == {"ttt_harness.methods"}, asking


@pytest.mark.parametrize(
    "source",
    [
        "method != 'icl'",
        "method in (None, 'icl')",
        "name.startswith('shared_')",
        "name.endswith(('e2e', '_x'))",
        "name.removesuffix('_vote')",
        "{'ttt': 1, 'e2e': 4}",
        "match name:\n    case 'icl': pass",
    ],
)
def test_what_counts_as_asking_for_a_methods_name(source: str) -> None:
    assert list(method_names_in(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    ["'ttt' in config", "config['ttt']", "{'method': 'icl'}", "task.startswith('bbh_ttt_')", "x.endswith('.py')"],
)
def test_what_does_not_count(source: str) -> None:
    assert not list(method_names_in(ast.parse(source)))
