"""Writes the headers' declarations as Python types, with which pagenet/_native is checked: ``python
native/declare.py``.

Run it after a change to one of ``HEADERS``: tests/unit/test_declarations.py fails until then. A
struct becomes a class. Functions, variables and constants become the members of one Protocol,
``Library``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pycparser import c_ast, c_parser

ROOT = Path(__file__).resolve().parents[1]
#: the headers of each extension, and the module that has their declarations
HEADERS = {
    ("native/pagenet.h", "native/pace.h"): "pagenet/_native/_declarations.py",
    ("native/testing/testing.h",): "pagenet/_native/_testing_declarations.py",
}
INTEGERS = (
    "int",
    "int8_t",
    "int16_t",
    "int32_t",
    "int64_t",
    "uint8_t",
    "uint16_t",
    "uint32_t",
    "uint64_t",
    "size_t",
)
WIDTH = 100

HEAD = '''"""What {headers} declare{s}, named as it is there. Made by native/declare.py:
do not edit."""

from __future__ import annotations

from typing import Protocol

from ._pointers import {imported}
'''


def parse(header: Path) -> list[Any]:
    """The header's declarations. Preprocessor lines and comments are left out, and the integer
    types are defined in front."""
    lines = [line for line in header.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"/\*.*?\*/", "", "\n".join(lines), flags=re.DOTALL)
    known = "".join(f"typedef int {name};" for name in (*INTEGERS[1:], "bool"))
    return [
        node
        for node in c_parser.CParser().parse(known + text).ext
        if not isinstance(node, c_ast.Typedef)
    ]


# ---- types ----


def name_of(node: Any) -> str:
    """The name of a type that is no pointer: ``int`` (all integers and enums), ``bool``,
    ``double``, ``char``, ``void``, or the name of a struct."""
    inner = node.type
    if isinstance(inner, c_ast.Struct):
        return str(inner.name)
    if isinstance(inner, c_ast.Enum):
        return "int"
    (name,) = inner.names
    return "int" if name in INTEGERS else str(name)


def is_struct(node: Any) -> bool:
    return isinstance(node.type, c_ast.Struct)


def type_of(node: Any) -> str:
    """The type in Python. cffi takes bytes where C only reads bytes. Any pointer may be NULL."""
    if isinstance(node, c_ast.ArrayDecl):
        return name_of(node.type) if is_struct(node.type) else "CData"
    if not isinstance(node, c_ast.PtrDecl):
        return {"double": "float", "void": "None"}.get(name_of(node), name_of(node))
    to = node.type
    if not isinstance(to, c_ast.TypeDecl):
        return "CData | Null"
    if is_struct(to):
        return f"{name_of(to)} | Null"
    return (
        "bytes | CData | Null"
        if name_of(to) in ("char", "void") and "const" in to.quals
        else "CData | Null"
    )


def result_of(node: Any) -> str:
    """The type of a function's result. Without Null: callers compare a pointer with NULL, or know
    that it is not NULL."""
    return type_of(node).removesuffix(" | Null")


# ---- classes ----


def fields_of(node: Any) -> Iterator[str]:
    for field in node.decls or ():
        yield f"    {field.name}: {type_of(field.type)}"


def struct(node: Any) -> str:
    return f"class {node.name}(Struct):\n" + ("\n".join(fields_of(node)) or "    pass")


def parameters(function: Any) -> Iterator[str]:
    for parameter in function.args.params:
        if parameter.name:  # (void) has none
            name = parameter.name if parameter.name != "from" else "from_"
            yield f"{name}: {type_of(parameter.type)}"


def method(node: Any) -> str:
    """The method on one line if that is short enough, otherwise with its parameters below."""
    names = [*parameters(node.type)]
    result = result_of(node.type.type)
    line = (
        f"    def {node.name}({', '.join(['self', *names, *(['/'] if names else [])])}) ->"
        f" {result}: ..."
    )
    if len(line) <= WIDTH:
        return line
    below = f"        self, {', '.join(names)}, /"
    if len(below) > WIDTH:
        below = "\n".join(f"        {name}," for name in ["self", *names, "/"])
    return f"    def {node.name}(\n{below}\n    ) -> {result}: ..."


def library(nodes: list[Any]) -> str:
    enums = [node.type for node in nodes if isinstance(node.type, c_ast.Enum)]
    constants = [f"    {value.name}: int" for enum in enums for value in enum.values.enumerators]
    variables = [
        f"    {node.name}: {type_of(node.type)}" for node in nodes if "extern" in node.storage
    ]
    methods = [method(node) for node in nodes if isinstance(node.type, c_ast.FuncDecl)]
    members = [*constants, *variables]
    return "\n".join(["class Library(Protocol):", *members, *([""] if members else []), *methods])


def structs(nodes: list[Any]) -> list[Any]:
    """One struct for each name. A struct without fields is opaque."""
    found: dict[str, Any] = {}
    for node in (node.type for node in nodes if isinstance(node.type, c_ast.Struct)):
        if node.name not in found or node.decls:
            found[node.name] = node
    return list(found.values())


def module(headers: tuple[str, ...]) -> str:
    """The text of the module with the declarations of ``headers``."""
    nodes = [node for header in headers for node in parse(ROOT / header)]
    classes = [*map(struct, structs(nodes)), library(nodes)]
    imported = ", ".join(
        name for name in ("CData", "Null", "Struct") if any(name in text for text in classes)
    )
    head = HEAD.format(
        headers=" and ".join(headers), s="s" if len(headers) == 1 else "", imported=imported
    )
    return "\n\n\n".join([head, *classes]).replace("\n\n\n\n", "\n\n\n") + "\n"


def main() -> None:
    for headers, path in HEADERS.items():
        (ROOT / path).write_text(module(headers))


if __name__ == "__main__":
    main()
