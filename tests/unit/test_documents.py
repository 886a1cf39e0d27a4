"""What the documents name exists: paths, links and their anchors. Their lines are not too long to
read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Not the changelog: it is about the past, whose files may be gone.
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "CHANGELOG.md"})
FOLDERS = ("pagenet", "native", "tests", "tools", "docs")
MAX_LINE = 100
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def prose(text: str) -> str:
    """The text without blocks of code between fences."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def paths_in(text: str) -> Iterator[str]:
    """Words that begin with a folder of the project: ``tests/test_a.py::test_b``'s file,
    ``tools/guest/``, ``docs/*.md``."""
    for word in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*", text):
        yield word.rstrip(".")


def bare_names_in(text: str) -> Iterator[str]:
    """Names of files without their folder, in backquotes."""
    yield from re.findall(r"`([\w-]+\.(?:py|c|h))`", text)


def anchors_of(text: str) -> set[str]:
    """The anchor of each heading, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(text: str) -> list[str]:
    """Links to files of the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [
        target for target in targets if "://" not in target and not target.startswith("mailto:")
    ]


def lines_to_read(text: str) -> Iterator[str]:
    """All lines but code, rows of tables, which cannot be wrapped, and lines that are one long
    word."""
    for line in prose(text).splitlines():
        if not line.startswith(("|", "    ")) and " " in line:
            yield line


def names_nothing(pattern: str, directory: Path = ROOT) -> bool:
    return not any(directory.glob(pattern))


def test_paths_are_seen() -> None:
    text = (
        "`tests/test_a.py::test_b`, tools/guest/. See (docs/*.md) and a/docs/x.md, `lane.c`,"
        " `pn_x.y`."
    )
    assert list(paths_in(text)) == ["tests/test_a.py", "tools/guest/", "docs/*.md"]
    assert list(bare_names_in(text)) == ["lane.c"]


def test_anchors_are_those_of_code_hosts() -> None:
    assert anchors_of("# What `x` costs: a, b\n## --transport rdma\n") == {
        "what-x-costs-a-b",
        "--transport-rdma",
    }


@each_document
def test_paths_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text()
    assert not [path for path in paths_in(text) if names_nothing(path.rstrip("/"))]
    assert not [
        name
        for name in bare_names_in(text)
        if all(names_nothing(f"{at}/**/{name}") for at in FOLDERS)
    ]


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in links_of(document.read_text()):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text()), link


@each_document
def test_lines_are_short(document: Path) -> None:
    assert not [line for line in lines_to_read(document.read_text()) if len(line) > MAX_LINE]


def test_tests_that_documents_name_exist() -> None:
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    for document in DOCUMENTS:
        for name in re.findall(r"`(test_\w+)`", document.read_text()):
            assert f"def {name}(" in tests, f"{document.name}: {name}"
