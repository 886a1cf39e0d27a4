"""What is made from the parsers, and from the docstrings: manual pages, completion, the API
reference."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PUBLIC = next(
    line.partition(":=")[2].split()
    for line in (ROOT / "Makefile").read_text().splitlines()
    if line.startswith("PUBLIC")
)


def load_tool(name: str) -> ModuleType:
    loader = SourceFileLoader(name, str(ROOT / "tools" / name))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return dict(load_tool("generate").pages())


def options_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z0-9-]+", text.replace("\\-", "-")))


def test_pages_are_those_of_the_parsers(pages: dict[str, str]) -> None:
    """Exactly, under the Python version that wrote them; others lay out usage in other ways."""
    for name, text in pages.items():
        there = (ROOT / "docs" / name).read_text()
        assert options_in(there) == options_in(text), f"{name}: run make generate"
        if sys.version_info[:2] == (3, 11):
            assert there == text, f"{name}: run make generate"


def test_manual_pages_are_well_formed(pages: dict[str, str]) -> None:
    macros = {".TH", ".SH", ".SS", ".TP", ".B", ".nf", ".fi"}
    for name in [name for name in pages if name.startswith("man/")]:
        text = (ROOT / "docs" / name).read_text()
        assert {line.split()[0] for line in text.splitlines() if line.startswith(".")} <= macros
        assert [
            f".SH {title}" in text for title in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS")
        ] == [True] * 4
        assert ".SH EXIT STATUS\n.nf\n  0    done" in text


COMPLETE = """
. "$1"
COMP_WORDS=($2) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_shtab_${3//-/_}
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(("words", "offered"), [
    ("pagenet-serve --li", {"--listen"}),
    ("pagenet-pull --lane na", {"native"}),
    ("pagenet-bench st", {"stream"}),
    ("pagenet-bench fault --memory h", {"hugetlb"}),
    ("pagenet-qemu inc", {"incoming"}),
    ("pagenet-ctl /run/x ban", {"bandwidth"}),
    ("pagenet-dirty 1 --rec", {"--record"}),
    ("pagenet-snapshot ex", {"export"}),
    ("pagenet-snapshot create --sp", {"--sparse"}),
])  # fmt: skip
def test_bash_completes(words: str, offered: set[str]) -> None:
    command = words.split()[0]
    path = ROOT / "docs" / "completion" / "bash" / command
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", str(path), words, command], capture_output=True, text=True
    )
    assert set(done.stdout.split()) == offered, done.stderr


def test_reference_has_every_public_name(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pdoc",
        "--docformat",
        "restructuredtext",
        "--output-directory",
        str(tmp_path),
        *PUBLIC,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in PUBLIC:
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text()
        missing = [public for public in import_module(name).__all__ if f'id="{public}"' not in page]
        assert not missing, f"{name}: {', '.join(missing)}"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_explained(name: str) -> None:
    module = import_module(name)
    assert module.__doc__
    unexplained = [
        public
        for public in module.__all__
        if callable(thing := getattr(module, public))
        and not inspect.getdoc(thing)
        and inspect.getmodule(thing) is not None
    ]
    assert not unexplained
