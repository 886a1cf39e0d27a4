"""Which module may import which. The graph has all imports, including those for the type checker
and those within functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """By name; a package is its __init__."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in root.glob(f"{package}/**/*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Those of ``modules`` that it imports. A name imported from a package counts as the package,
    unless it is a module."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            source = ".".join([*base, *([node.module] if node.module else [])])
            inner = (f"{source}.{alias.name}" for alias in node.names)
            yield from (
                module if module in modules else source for module in inner if source in modules
            )


def graph_of(root: Path, package: str = "pagenet") -> dict[str, set[str]]:
    modules = modules_of(root, package)
    return {name: set(imports_of(name, path, modules)) - {name} for name, path in modules.items()}


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def reach(graph: dict[str, set[str]], name: str) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


@pytest.mark.parametrize("text", [
    "from . import b",
    "from .b import thing",
    "import p.b",
    "from p import b",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import thing",
    "def f():\n    from .b import thing",
])  # fmt: skip
def test_every_kind_of_import_is_seen(text: str, tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text(text)
    (package / "b.py").write_text("from .a import f")
    graph = graph_of(tmp_path, "p")
    assert graph["p.a"] == {"p.b"}
    assert set(cycle_in(graph)) == {"p.a", "p.b"}


def test_no_import_cycles() -> None:
    cycle = cycle_in(graph_of(ROOT))
    assert not cycle, " <- ".join(cycle)


SIDES = ("pagenet.source", "pagenet.destination", "pagenet.background")
BACKENDS = ("pagenet.tcp", "pagenet.rdma", "pagenet.uffd")
SURFACE = (
    *("pagenet.cli", "pagenet.bench", "pagenet.control", "pagenet.qemu", "pagenet.testing"),
    "pagenet.direct",
)


def within(names: set[str], *rooms: str) -> set[str]:
    return {
        name
        for name in names
        if name.startswith(tuple(f"{room}." for room in rooms)) or name in rooms
    }


@pytest.mark.parametrize("seam", ["pagenet.transport", "pagenet.target"])
def test_seams_know_neither_side(seam: str) -> None:
    assert not within(reach(graph_of(ROOT), seam), *SIDES, *BACKENDS, *SURFACE)


def test_the_sides_do_not_know_each_other() -> None:
    graph = graph_of(ROOT)
    for name in within(set(graph), "pagenet.source"):
        assert not within(reach(graph, name), "pagenet.destination", "pagenet.background"), name
    for name in within(set(graph), "pagenet.destination", "pagenet.background"):
        assert not within(reach(graph, name), "pagenet.source"), name


def test_what_fetches_pages_knows_neither_side() -> None:
    graph = graph_of(ROOT)
    for name in within(set(graph), "pagenet.objects", "pagenet.peers"):
        assert not within(reach(graph, name), *SIDES, *SURFACE), name


def test_nothing_below_the_command_line_imports_it() -> None:
    graph = graph_of(ROOT)
    for name in set(graph) - within(set(graph), "pagenet.cli"):
        assert not within(graph[name], "pagenet.cli"), name


@pytest.mark.parametrize("command", ["serve", "pull", "qemu", "ctl", "dirty", "snapshot"])
def test_commands_do_without_what_tests_and_benches_need(command: str) -> None:
    needed = reach(graph_of(ROOT), f"pagenet.cli.{command}")
    assert not within(needed, "pagenet._native.testing", "pagenet.testing", "pagenet.bench")


def test_the_extension_modules_are_touched_in_one_place() -> None:
    graph = graph_of(ROOT)
    extensions = {
        f"pagenet.{name}": ROOT / "pagenet" / f"{name}.so"
        for name in ("_pagenet", "_pagenet_testing")
    }
    modules = modules_of(ROOT, "pagenet")
    importing = {
        name
        for name in graph
        if extensions.keys() & set(imports_of(name, modules[name], modules | extensions))
    }
    assert importing == {"pagenet._native._library", "pagenet._native.testing"}
