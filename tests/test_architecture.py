"""The shape of the source, read from its syntax trees: what the core may import, what is public, what is documented."""

from __future__ import annotations

import ast
import functools
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("core", "backends", "adapters")
MAX_BODY_LINES = 60
MAX_MODULE_LINES = 600
MIN_DOCUMENTED = 0.85

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Module(NamedTuple):
    """One source file, parsed."""

    name: str
    is_package: bool
    line_count: int
    tree: ast.Module

    @property
    def package(self) -> str:
        """The package that a relative import of one dot starts from."""
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))

    @property
    def is_core(self) -> bool:
        """In the sans-IO core proper: the testing kit drives both loops for its users and is not."""
        return _inside(self.name, "tokenwire.core") and not _inside(self.name, "tokenwire.core.testing")


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _load(root: Path, path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    parts = path.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    return Module(name, is_package, len(text.splitlines()), ast.parse(text, filename=str(path)))


MODULES = [_load(ROOT / root, path) for root in SOURCE_ROOTS for path in sorted((ROOT / root).rglob("*.py"))]
CORE = [module for module in MODULES if module.is_core]


def by_name(modules: list[Module]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", modules, ids=[module.name for module in modules])


@functools.cache
def forbidden_in_core() -> frozenset[str]:
    """The list that import-linter holds; here it is also held against imports inside functions and type checks."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (c for c in config["tool"]["importlinter"]["contracts"] if c.get("id") == "sans-io")
    return frozenset(contract["forbidden_modules"])


def imported_modules(module: Module) -> Iterator[str]:
    """Absolute names of all that a module imports, wherever the statement stands."""
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                base = module.package.rsplit(".", level - 1)[0] if level else ""
                origin = ".".join(part for part in (base, source) if part)
                yield origin
                yield from (f"{origin}.{alias.name}" for alias in names)
            case _:
                pass


def called_names(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def bound_names(target: ast.expr) -> Iterator[str]:
    for node in ast.walk(target):
        if isinstance(node, ast.Name):
            yield node.id


def top_level_names(tree: ast.Module) -> Iterator[str]:
    """Every name that a module's top level binds, also under `if` and `try`."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
            case ast.Assign():
                for target in node.targets:
                    yield from bound_names(target)
            case ast.AnnAssign():
                yield from bound_names(node.target)
            case ast.If() | ast.Try() | ast.ExceptHandler() | ast.With():
                pending.extend(ast.iter_child_nodes(node))
            case _:
                pass


def exported(module: Module) -> list[str] | None:
    """What `__all__` lists, None where there is none."""
    for node in module.tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="__all__")], value=value)
                | ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.expr() as value)
            ):
                names: list[str] = ast.literal_eval(value)
                return names
            case _:
                pass
    return None


def is_public_definition(node: ast.AST) -> bool:
    return isinstance(node, DEFINITIONS) and not node.name.startswith("_")


def is_repeated(node: Definition) -> bool:
    """An overload, a setter or an override: its documentation stands at the definition that it repeats."""
    marks = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(mark.rpartition(".")[2] in {"overload", "override", "setter", "deleter"} for mark in marks)


def public_definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, bool]]:
    """Each public class, function and method with its dotted name, and whether it has a docstring."""
    for node in body:
        if isinstance(node, DEFINITIONS) and is_public_definition(node) and not is_repeated(node):
            name = f"{prefix}.{node.name}"
            yield name, ast.get_docstring(node) is not None
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, name)


def functions(module: Module) -> Iterator[Function]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the end."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_there_is_something_to_look_at() -> None:
    assert {"tokenwire.core", "tokenwire.core.errors"} <= {module.name for module in CORE}


@by_name(CORE)
def test_the_core_imports_no_loop_socket_clock_or_log(module: Module) -> None:
    assert {name.partition(".")[0] for name in imported_modules(module)} & forbidden_in_core() == set()


@by_name(CORE)
def test_the_core_imports_nothing_by_a_computed_name(module: Module) -> None:
    assert {name for name in called_names(module) if name.endswith(("__import__", "import_module"))} == set()


@by_name(CORE)
def test_the_core_needs_neither_the_testing_kit_nor_an_outer_layer(module: Module) -> None:
    outer = ("tokenwire.core.testing", "tokenwire.backends", "tokenwire.adapters")
    assert [name for name in imported_modules(module) if any(_inside(name, layer) for layer in outer)] == []


@by_name([module for module in MODULES if module.is_public and any(top_level_names(module.tree))])
def test_all_lists_what_exists_and_every_public_definition(module: Module) -> None:
    names = exported(module)
    assert names is not None, f"{module.name} has no __all__"
    assert len(set(names)) == len(names)
    assert set(names) - set(top_level_names(module.tree)) == set()
    assert {
        node.name for node in module.tree.body if isinstance(node, DEFINITIONS) and is_public_definition(node)
    } <= set(names)


def test_public_names_of_the_core_are_documented() -> None:
    found = {module.name: ast.get_docstring(module.tree) is not None for module in CORE if module.is_public}
    for module in CORE:
        if module.is_public:
            found.update(public_definitions(module.tree.body, module.name))
    bare = sorted(name for name, documented in found.items() if not documented)
    assert 1 - len(bare) / len(found) >= MIN_DOCUMENTED, f"undocumented: {bare}"


@by_name(MODULES)
def test_functions_and_modules_stay_small(module: Module) -> None:
    assert module.line_count <= MAX_MODULE_LINES
    assert {node.name: lines for node in functions(module) if (lines := body_lines(node)) > MAX_BODY_LINES} == {}
