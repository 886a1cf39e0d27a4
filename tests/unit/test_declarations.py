"""The types that pagenet/_native is checked with, against the headers and against what was built
from them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest
from _cffi_backend import FFI

ROOT = Path(__file__).parents[2]


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("declare", ROOT / "native" / "declare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


declare = load_generator()

EXTENSIONS = {
    "_declarations": "pagenet._pagenet",
    "_testing_declarations": "pagenet._pagenet_testing",
}


def declarations(name: str) -> ModuleType:
    return importlib.import_module(f"pagenet._native.{name}")


@pytest.mark.parametrize("headers", declare.HEADERS)
def test_types_are_those_of_the_headers(headers: tuple[str, ...]) -> None:
    text = (ROOT / declare.HEADERS[headers]).read_text()
    assert text == declare.module(headers), "run python native/declare.py"


@pytest.mark.parametrize("name", EXTENSIONS)
def test_types_have_all_that_was_built(name: str) -> None:
    library = declarations(name).Library
    declared = {
        member
        for member in [*vars(library), *library.__annotations__]
        if member.lower().startswith("pn_")
    }
    assert declared == set(dir(importlib.import_module(EXTENSIONS[name]).lib))


def built_fields(ffi: FFI, struct: str) -> list[str]:
    """cffi crashes when it is asked for the fields of an opaque struct; it knows no size of
    that."""
    try:
        ffi.sizeof(f"struct {struct}")
    except ffi.error:
        return []
    return [name for name, _ in ffi.typeof(f"struct {struct}").fields]


@pytest.mark.parametrize("name", EXTENSIONS)
def test_structs_have_the_fields_that_were_built(name: str) -> None:
    module, ffi = declarations(name), importlib.import_module(EXTENSIONS[name]).ffi
    structs = [
        kind for kind in vars(module).values() if getattr(kind, "__name__", "").startswith("pn_")
    ]
    assert structs
    for struct in structs:
        assert list(inspect.get_annotations(struct)) == built_fields(ffi, struct.__name__), struct


@pytest.mark.parametrize(("declaration", "method"), [
    ("int pn_f(void);", "def pn_f(self) -> int: ..."),
    ("uint64_t pn_f(uint8_t a, enum pn_how from);",
        "def pn_f(self, a: int, from_: int, /) -> int: ..."),
    ("void pn_f(double a);", "def pn_f(self, a: float, /) -> None: ..."),
    ("struct pn_s pn_f(int64_t a);", "def pn_f(self, a: int, /) -> pn_s: ..."),
    ("struct pn_s *pn_f(struct pn_t *a);", "def pn_f(self, a: pn_t | Null, /) -> pn_s: ..."),
    ("int pn_f(const struct pn_t *a);", "def pn_f(self, a: pn_t | Null, /) -> int: ..."),
    ("int pn_f(const char *a);", "def pn_f(self, a: bytes | CData | Null, /) -> int: ..."),
    ("int pn_f(const void *a, void *b);",
        "def pn_f(self, a: bytes | CData | Null, b: CData | Null, /) -> int: ..."),
    ("int pn_f(uint64_t *a, char **b);",
        "def pn_f(self, a: CData | Null, b: CData | Null, /) -> int: ..."),
])  # fmt: skip
def test_types_of_a_function(declaration: str, method: str, tmp_path: Path) -> None:
    header = tmp_path / "header.h"
    header.write_text(f"#include <stdint.h>\n/* a\n * comment */\n{declaration} /* another */\n")
    assert declare.method(declare.parse(header)[-1]).strip() == method


def test_types_of_a_struct(tmp_path: Path) -> None:
    header = tmp_path / "header.h"
    header.write_text(
        "struct pn_a { struct pn_b b[3], *c; struct pn_d d; const uint64_t *e; char f[8]; double g;"
        " uint32_t h, i; };"
    )
    (struct,) = declare.structs(declare.parse(header))
    assert declare.struct(struct).splitlines() == [
        "class pn_a(Struct):",
        "    b: pn_b",
        "    c: pn_b | Null",
        "    d: pn_d",
        "    e: CData | Null",
        "    f: CData",
        "    g: float",
        "    h: int",
        "    i: int",
    ]
