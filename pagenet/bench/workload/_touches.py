"""The first touches of a program, and the time between them, on disk: written by ``pagenet-bench
trace``.

A file is one msgpack map: ``format`` ("pagenet-trace"), ``version`` (1), ``pages`` (of 4 KiB, of
the program's data) and ``touches``: two numbers for each page that was touched, in the order of the
touches. The first is the page's number minus that of the page after the previous one; the second is
how many ns the program worked before the touch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...background.recording import MOST_PAGES, load_fields, write_fields
from ...errors import UsageError
from ...whole_file import WholeFile

__all__ = [
    "TOUCHES_FORMAT",
    "TOUCHES_VERSION",
    "Touches",
    "load_touches",
    "touches_file",
    "touches_of",
]

TOUCHES_FORMAT, TOUCHES_VERSION = "pagenet-trace", 1
# Before one touch: an hour. Playing a trace takes as long as it has.
_MOST_NS = 3600 * 10**9


@dataclass(frozen=True)
class Touches:
    """Which of ``pages`` pages of 4 KiB were touched, in the order of their first touches, each
    with the ns of processor time that the program had taken since the previous one."""

    pages: int
    touches: tuple[tuple[int, int], ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Replace the file at ``path``, whole or not at all. :exc:`~pagenet.PagenetError` if it
        cannot be written."""
        with touches_file(path) as file:
            self.write(file)

    def write(self, file: WholeFile) -> None:
        """Write it as the whole content of ``file``."""
        numbers = list(_packed(self.touches[:MOST_PAGES]))
        fields = {
            "format": TOUCHES_FORMAT,
            "version": TOUCHES_VERSION,
            "pages": self.pages,
            "touches": numbers,
        }
        write_fields(file, fields)


def touches_file(path: str | os.PathLike[str]) -> WholeFile:
    """The file that :class:`Touches` are written into. :exc:`UsageError` if it cannot be made."""
    return WholeFile(path, "trace")


def load_touches(path: str | os.PathLike[str]) -> Touches:
    """The trace in that file. :exc:`UsageError`, in one line, if there is none, or if it has
    another format, is broken, or has an unknown version."""
    return touches_of(load_fields(path, {TOUCHES_FORMAT: TOUCHES_VERSION}, "trace"), path)


def touches_of(fields: dict[str, Any], path: str | os.PathLike[str]) -> Touches:
    """The trace in the fields of that file. :exc:`UsageError` if they make no sense."""
    try:
        pages, numbers = fields["pages"], fields["touches"]
        if type(pages) is not int or not 0 < pages < 1 << 40 or not isinstance(numbers, list):
            raise ValueError("its numbers make no sense")
        return Touches(pages, tuple(_unpacked(numbers, pages)))
    except (KeyError, ValueError) as error:
        raise UsageError(f"{os.fspath(path)} is a broken trace: {error}") from None


def _packed(touches: Sequence[tuple[int, int]]) -> Iterator[int]:
    end = 0
    for page, work in touches:
        yield from (page - end, min(work, _MOST_NS))
        end = page + 1


def _unpacked(numbers: Sequence[int], pages: int) -> Iterator[tuple[int, int]]:
    if (
        len(numbers) % 2
        or len(numbers) > 2 * MOST_PAGES
        or not all(type(number) is int for number in numbers)
    ):
        raise ValueError("its numbers make no sense")
    end, seen = 0, set[int]()
    for skip, work in zip(numbers[::2], numbers[1::2], strict=True):
        page = end + skip
        if not 0 <= page < pages or page in seen or not 0 <= work <= _MOST_NS:
            raise ValueError("its touches make no sense")
        seen.add(page)
        end = page + 1
        yield page, work
