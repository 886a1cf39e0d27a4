"""A snapshot checked, written as one file, and compared with another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import trio

from ..errors import SourceLost, UsageError
from ..region import Run
from ..whole_file import WholeFile
from .index import FRAME_PAGES, PAGE, ZERO_FRAME, Index
from .memory import SnapshotMemory
from .opened import Snapshot, digest_of

__all__ = ["Flaws", "compare_snapshots", "export_snapshot", "verify_snapshot"]

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Flaws:
    """What is wrong with a snapshot: so many frames of ``frames``, with ``pages`` pages of the
    memory; ``first``: one of them, in one line, or nothing."""

    frames: int
    broken: int
    pages: int
    first: str


async def verify_snapshot(snapshot: Snapshot, on_progress: Progress = lambda done: None) -> Flaws:
    """Read every frame, and compare it with its checksum and its digest. ``on_progress`` gets the
    number of pages that were checked, in a thread."""
    index = snapshot.index
    broken: dict[int, str] = {}

    def check(frame: int) -> None:
        try:
            if snapshot.read_frame(frame, digest_of) != index.digest(frame):
                raise snapshot.lost(f"frame {frame} is not the one that the index names (digest)")
        except SourceLost as error:
            broken[frame] = str(error)

    await snapshot.each_frame(check, _counted(index, on_progress))
    pages = sum(run.pages for frame in broken for run in index.runs_of(frame))
    first = broken[min(broken)] if broken else ""
    return Flaws(index.frames, len(broken), pages, first)


async def export_snapshot(
    snapshot: Snapshot, path: str | os.PathLike[str], on_progress: Progress = lambda done: None
) -> None:
    """Write the memory of a snapshot as one file, whole or not at all; pages of zeros are holes.
    ``on_progress`` gets the number of pages that were written, in a thread.

    :exc:`SourceLost` if a frame cannot be read, :exc:`~pagenet.errors.UsageError` or
    :exc:`~pagenet.errors.PagenetError` if the file cannot be written.
    """
    index = snapshot.index
    with WholeFile(path, "memory") as file:
        file.resize(index.size)

        def place(frame: int) -> None:
            snapshot.read_frame(frame, lambda pages: index.scatter(frame, pages, file.write))

        await snapshot.each_frame(place, _counted(index, on_progress))
        await file.wait_committed()


def _counted(index: Index, on_progress: Progress) -> Callable[[int], None]:
    done = 0

    def count(frame: int) -> None:
        nonlocal done
        done += index.columns.frame_pages[frame]
        on_progress(done)

    return count


async def compare_snapshots(
    one: Snapshot,
    other: Snapshot,
    on_run: Callable[[Run], None],
    on_progress: Progress = lambda done: None,
) -> int:
    """How many pages differ. ``on_run`` gets the runs of them, in order, ``on_progress`` the number
    of pages that were compared. Pages of frames that are equal are not read.

    :exc:`UsageError` if they are not of as much memory, :exc:`SourceLost` if one cannot be read.
    """
    pages = one.index.pages
    if pages != other.index.pages:
        raise UsageError(
            f"{one.name} has {one.index.size} bytes, and {other.name} {other.index.size}"
        )
    differ = 0
    with closing(SnapshotMemory(one)) as left, closing(SnapshotMemory(other)) as right:
        for first in range(0, pages, FRAME_PAGES):
            slot = Run(first, min(FRAME_PAGES, pages - first))
            if _content(one.index, slot) != _content(other.index, slot):
                for memory in (left, right):
                    await memory.fetch(slot.first * PAGE, slot.count * PAGE)
                for run in await trio.to_thread.run_sync(_differing, left, right, slot):
                    differ += run.count
                    on_run(run)
            await trio.lowlevel.checkpoint()
            on_progress(slot.end)
    return differ


def _content(index: Index, slot: Run) -> list[tuple[int, bytes, int]]:
    """What is in the pages of ``slot``, as the index tells: equal if they are equal, but not only
    then."""
    return [
        (run.pages, b"" if run.frame == ZERO_FRAME else index.digest(run.frame), run.at)
        for run in index.stretches(slot.first, slot.count)
    ]


def _differing(left: SnapshotMemory, right: SnapshotMemory, slot: Run) -> list[Run]:
    both = [bytearray(slot.count * PAGE) for _ in range(2)]
    for memory, into in zip((left, right), both, strict=True):
        memory.read(slot.first * PAGE, memoryview(into))
        memory.forget(slot.end * PAGE)
    return list(_runs(both[0], both[1], slot))


def _runs(one: bytearray, other: bytearray, slot: Run) -> Iterator[Run]:
    first = None
    for page in range(slot.count + 1):
        at = slice(page * PAGE, (page + 1) * PAGE)
        if page < slot.count and one[at] != other[at]:
            first = page if first is None else first
        elif first is not None:
            yield Run(slot.first + first, page - first)
            first = None
