"""All checks, in the order in which people want to read them."""

from __future__ import annotations

from collections.abc import Iterator

from ._check import Check
from ._host import host_checks
from ._kernel import kernel_checks
from ._programs import program_checks

__all__ = ["examine"]


def examine() -> Iterator[Check]:
    """Try one thing after the other. Changes nothing; takes a second or two, for programs that are
    asked for their versions."""
    yield from kernel_checks()
    yield from host_checks()
    yield from program_checks()
