"""The order in which threads waited for pages, on disk: recorded in one run, replayed in the next.

A file is one msgpack map: ``format`` ("pagenet-touches"), ``version`` (1), ``runs`` (how many runs
were merged into it), ``blocks`` (names, and sizes in bytes) and ``touches``. ``touches`` is a list
of numbers, three for each stretch of consecutive pages of 4 KiB: how many pages its first page lies
after the end of the stretch before (negative if it lies before that end), how many pages it has,
and in how many of the runs they were seen. Pages are numbered through all blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgpack

from ..errors import UsageError
from ..region import Block, Region, Run
from ..whole_file import WholeFile, read_whole

__all__ = [
    "FORMAT",
    "MOST_BYTES",
    "MOST_PAGES",
    "UNIT",
    "VERSION",
    "Recorder",
    "Recording",
    "blocks_in",
    "blocks_of",
    "fields_of",
    "load_fields",
    "load_recording",
    "recording_file",
    "recording_of",
    "units_of",
    "write_fields",
]

Collected = TypeVar("Collected", list[Any], dict[Any, Any])

FORMAT, VERSION = "pagenet-touches", 1
UNIT = 4096
# Pages that are remembered: 4 GiB of them. A larger working set is not worth an order.
MOST_PAGES = 1 << 20
# A file with more bytes or more values than this was not written by pagenet, and is refused. The
# limit of values bounds what a file takes in memory: one byte may be an empty list, of 64 bytes.
MOST_BYTES = 64 << 20
_MOST_VALUES = 4 * MOST_PAGES


@dataclass(frozen=True)
class Recording:
    """The pages that threads waited for, in order.

    ``blocks``: names, and sizes in bytes. ``order``: flat numbers of pages of 4 KiB, the first
    touched first. ``seen``: for each of them, in how many of the ``runs`` runs it was seen.
    """

    blocks: tuple[tuple[str, int], ...]
    order: tuple[int, ...]
    seen: tuple[int, ...]
    runs: int = 1

    def merge(self, later: Recording) -> Recording:
        """This recording with that of a later run added.

        Pages are in the order of their mean rank. Pages seen in fewer than half of the runs come
        last.
        """
        earlier = self._moved_to(later.blocks)
        ranks: dict[int, tuple[float, int]] = {}
        for page, seen, rank in zip(
            earlier.order, earlier.seen, _ranks(earlier.order), strict=True
        ):
            ranks[page] = (rank, seen)
        for page, rank in zip(later.order, _ranks(later.order), strict=True):
            mean, seen = ranks.get(page, (0.0, 0))
            ranks[page] = ((mean * seen + rank) / (seen + 1), seen + 1)
        runs = self.runs + later.runs
        pages = sorted(ranks, key=lambda page: (2 * ranks[page][1] < runs, ranks[page][0]))[
            :MOST_PAGES
        ]
        return Recording(later.blocks, tuple(pages), tuple(ranks[page][1] for page in pages), runs)

    def _moved_to(self, blocks: tuple[tuple[str, int], ...]) -> Recording:
        """The same pages as a region with ``blocks`` numbers them; blocks are matched by name.

        Pages that this region does not have are left out.
        """
        starts = dict(_starts(blocks))
        sizes = dict(blocks)
        moves = [
            (start, start + min(size, sizes[name]) // UNIT, starts[name] - start)
            for (name, size), (_, start) in zip(self.blocks, _starts(self.blocks), strict=True)
            if name in sizes
        ]
        kept = [
            (page + by, seen)
            for page, seen in zip(self.order, self.seen, strict=True)
            for first, end, by in moves
            if first <= page < end
        ]
        return replace(
            self,
            blocks=blocks,
            order=tuple(page for page, _ in kept),
            seen=tuple(seen for _, seen in kept),
        )

    def pages_in(self, region: Region) -> list[int]:
        """The recorded pages, in order, as ``region`` numbers them: its blocks may have other sizes
        and larger pages."""
        moved = self._moved_to(blocks_of(region))
        return list(dict.fromkeys(region.page_at_offset(page * UNIT) for page in moved.order))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file at ``path``, or replace it, whole or not at all. :exc:`PagenetError` if it
        cannot be written."""
        with recording_file(path) as file:
            self.write(file)

    def write(self, file: WholeFile) -> None:
        """Write this recording as the whole content of ``file``."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "runs": self.runs,
            "blocks": [list(block) for block in self.blocks],
            "touches": list(_packed(self.order, self.seen)),
        }
        write_fields(file, fields)


class Recorder:
    """Collects the pages that threads wait for, each once, until ``MOST_PAGES`` are reached."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._pages: dict[int, None] = {}

    def note(self, pages: Iterable[int]) -> None:
        if len(self._pages) < MOST_PAGES:
            self._pages.update(dict.fromkeys(pages))

    def recording(self) -> Recording:
        units = [unit for page in self._pages for unit in units_of(self._region, page)][:MOST_PAGES]
        return Recording(blocks_of(self._region), tuple(units), (1,) * len(units))


def units_of(region: Region, page: int) -> range:
    """The flat numbers of the pages of 4 KiB that ``page`` of ``region`` has."""
    first = region.offset_of_page(page) // UNIT
    return range(first, first + region.page_size_at(page) // UNIT)


def recording_file(path: str | os.PathLike[str]) -> WholeFile:
    """The file that a :class:`Recording` is written into. :exc:`UsageError` if there can be no
    file."""
    return WholeFile(path, "recording")


def write_fields(file: WholeFile, fields: dict[str, Any]) -> None:
    """Write ``fields`` as one msgpack map, and commit the file."""
    file.write(msgpack.packb(fields))
    file.commit()


def load_fields(
    path: str | os.PathLike[str], versions: Mapping[str, int], what: str
) -> dict[str, Any]:
    """The map that :func:`write_fields` wrote, of a format and version in ``versions``.

    ``what``: what error messages call the file. Raises :exc:`UsageError`, in one line, if there is
    no file, or it is foreign, broken, or of another version.
    """
    return fields_of(read_whole(path, MOST_BYTES, what), versions, what, os.fspath(path))


def fields_of(body: bytes, versions: Mapping[str, int], what: str, name: str) -> dict[str, Any]:
    """The same from the content of a file of that name."""
    try:
        found = _unpack(body)
    except Exception as error:
        # msgpack raises ValueError, errors of its own, and UnicodeDecodeError; all mean the same
        raise UsageError(
            f"{name} is not a {what}, or a broken one: {str(error) or type(error).__name__}"
        ) from None
    fields: dict[str, Any] = found if isinstance(found, dict) else {}
    kind = fields.get("format")
    if not isinstance(kind, str) or kind not in versions:
        raise UsageError(f"{name} is not a {what} of pagenet's")
    version, known = fields.get("version"), versions[kind]
    if type(version) is not int:  # not shown: the repr of a deep structure recurses too far
        raise UsageError(f"{name} is a broken {what}: its version is no number")
    if version != known:
        raise UsageError(
            f"{name} is a {what} of version {version}: this pagenet reads version {known}"
        )
    return dict(fields)


def _unpack(body: bytes) -> object:
    left = _MOST_VALUES

    def count(values: Collected) -> Collected:
        nonlocal left
        left -= 1 + len(values)
        if left < 0:
            raise ValueError("it has more values than any that pagenet writes")
        return values

    found: object = msgpack.unpackb(
        body, list_hook=count, object_hook=count, max_array_len=_MOST_VALUES
    )
    return found


def load_recording(path: str | os.PathLike[str]) -> Recording:
    """The recording at ``path``. :exc:`UsageError`, in one line, if there is none, or it is
    foreign, broken, or of a version that is not known."""
    return recording_of(load_fields(path, {FORMAT: VERSION}, "recording"), path)


def recording_of(fields: dict[str, Any], path: str | os.PathLike[str]) -> Recording:
    """The recording that has these fields, read from ``path``. :exc:`UsageError` if they make no
    sense."""
    try:
        return _checked(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{os.fspath(path)} is a broken recording: {error}") from None


def blocks_in(fields: dict[str, Any]) -> tuple[tuple[tuple[str, int], ...], Region]:
    """The ``blocks`` of a file, and a region of them. :exc:`ValueError`, :exc:`KeyError` or
    :exc:`TypeError` if they make no sense."""
    blocks = tuple((name, size) for name, size in fields["blocks"])
    if not all(type(name) is str and type(size) is int for name, size in blocks):
        raise ValueError("its blocks make no sense")
    try:
        return blocks, Region(Block(name, size) for name, size in blocks)
    except UsageError as error:
        raise ValueError(str(error)) from None


def _checked(fields: dict[str, Any]) -> Recording:
    blocks, region = blocks_in(fields)
    runs, numbers = fields["runs"], fields["touches"]
    if not isinstance(runs, int) or not 0 < runs < 1 << 32 or not isinstance(numbers, list):
        raise ValueError("its numbers make no sense")
    pages: dict[int, int] = {}
    for run, seen in _unpacked(numbers):
        if not (
            run.first >= 0
            and 0 < run.count <= MOST_PAGES - len(pages)
            and run.end <= region.pages
            and 0 < seen <= runs
        ):
            raise ValueError("its pages make no sense")
        pages.update(dict.fromkeys(range(run.first, run.end), seen))
    return Recording(blocks, tuple(pages), tuple(pages.values()), runs)


def _packed(order: Sequence[int], seen: Sequence[int]) -> Iterator[int]:
    end = at = 0
    while at < len(order):
        count = 1
        while (
            at + count < len(order)
            and order[at + count] == order[at] + count
            and seen[at + count] == seen[at]
        ):
            count += 1
        yield from (order[at] - end, count, seen[at])
        end = order[at] + count
        at += count


def _unpacked(numbers: Sequence[int]) -> Iterator[tuple[Run, int]]:
    if len(numbers) % 3 or not all(type(number) is int for number in numbers):
        raise ValueError("its numbers make no sense")
    end = 0
    for skip, count, seen in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        run = Run(end + skip, count)
        end = run.end
        yield run, seen


def _ranks(order: Sequence[int]) -> Iterator[float]:
    return (rank / len(order) for rank in range(len(order)))


def _starts(blocks: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    start = 0
    for name, size in blocks:
        yield name, start
        start += size // UNIT


def blocks_of(region: Region) -> tuple[tuple[str, int], ...]:
    return tuple((block.name, block.size) for block in region.blocks)
