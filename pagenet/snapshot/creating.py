"""Making a snapshot, whole or with what has changed since another."""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, islice

import trio

from .. import _native
from ..errors import UsageError
from ..region import Run
from ..source.memory import Source
from .index import DIGEST_SIZE, FRAME_PAGES, PAGE, ZERO_FRAME, Index, Tables, encode_index
from .memory import SnapshotMemory
from .objects import giving_up, is_store, locate
from .opened import WORKERS, Snapshot, digest_of, in_threads, open_snapshot_in_thread
from .pieces import store_piece
from .storing import Sink, open_sink

__all__ = ["Created", "check_creatable", "create_snapshot"]

# Frames that wait to be packed: packed together, in several threads.
_MOST_WAITING = 2 * WORKERS
# A frame of which so few pages are used is small. Beyond so many of them, those are merged, so many
# at a time at most: that takes 64 MiB of memory.
_SMALL_PAGES = 64
_MOST_SMALL = 64
_MOST_MERGED = 256
# Marks of pages that are not stored.
_ZERO, _SAME, _NEW = range(3)
# One of them, and the first page and the number of pages that it is for.
Mark = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Created:
    """What was created: its ``pages``, of which so many are zero, the same as the base's, or new.
    ``frames``: with the new pages; ``equal``: of them, those that were stored already. ``bytes``:
    of new objects, the index included."""

    id: str
    layers: int
    pages: int
    zero: int
    same: int
    new: int
    frames: int
    equal: int
    runs: int
    bytes: int
    seconds: float


async def create_snapshot(
    source: Source,
    target: str,
    base: str | None = None,
    sparse: bool = False,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Created:
    """Make the snapshot ``target`` (``DIR/NAME`` or ``s3://BUCKET/PREFIX/NAME``) of a source of one
    block. ``base``: a snapshot of as much memory in the same place; pages that are as there are not
    stored again. ``sparse``: the source has only what has changed since the base, and a hole
    everywhere else, as Firecracker writes it; the base is not read then. ``on_progress`` gets
    the number of pages that were looked at.

    The snapshot appears whole, in place of one that had its name, or not at all.
    :exc:`~pagenet.errors.UsageError`, :exc:`~pagenet.errors.SourceLost` if the source or the base
    cannot be read or the source has changed, :exc:`~pagenet.errors.SourceUnreachable` if a store
    does not answer, :exc:`~pagenet.errors.PagenetError` if there is no room.
    """
    if sparse and base is None:
        raise UsageError("a sparse file has only what has changed since a base: name that too")
    _check_blocks(source)
    where, name = locate(target)
    with ExitStack() as stack:
        sink = open_sink(where, name)
        try:
            found = await _opened_base(stack, base, where, source.region.size)
            layer = _Layer(sink, found)
            await layer.take(source, sparse, on_progress)
            await layer.merge()
            source.check_unchanged()
            return await layer.commit()
        finally:
            await sink.close()


async def check_creatable(source: Source, target: str, base: str | None) -> None:
    """Raise what :func:`create_snapshot` would raise at its beginning."""
    _check_blocks(source)
    where, name = locate(target)
    with ExitStack() as stack:
        await open_sink(where, name).close()
        await _opened_base(stack, base, where, source.region.size)


def _check_blocks(source: Source) -> None:
    if len(source.region.blocks) != 1:
        raise UsageError("a snapshot is of one block of memory")


async def _opened_base(
    stack: ExitStack, base: str | None, where: str, size: int
) -> tuple[Snapshot, SnapshotMemory] | None:
    if base is None:
        return None
    if not _is_same_place(locate(base)[0], where):
        raise UsageError(f"base {base} is not in {where}: a layer needs its base beside it")
    snapshot = await open_snapshot_in_thread(base)
    stack.callback(snapshot.close)
    if snapshot.index.size != size:
        raise UsageError(f"base {base} has {snapshot.index.size} bytes, and the memory {size}")
    # so that they stay if somebody deletes the base and prunes while this layer has no index yet
    snapshot.objects.refresh(snapshot.index.objects)
    memory = SnapshotMemory(snapshot)
    stack.callback(memory.close)
    return snapshot, memory


def _is_same_place(one: str, other: str) -> bool:
    if is_store(one) or is_store(other):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)


class _Layer:
    """A snapshot in the making."""

    def __init__(self, sink: Sink, base: tuple[Snapshot, SnapshotMemory] | None) -> None:
        self._snapshot: Snapshot | None = None
        self._base: Index | None = None
        self._base_memory: SnapshotMemory | None = None
        if base is not None:
            self._snapshot, self._base_memory = base
            self._base = self._snapshot.index
        self._tables = Tables()
        self._sink = sink
        #: of objects, by their names
        self._numbers: dict[str, int] = {}
        #: pages of the frame that is open, which has a number already
        self._open = bytearray()
        self._open_number = -1
        self._waiting: list[tuple[int, bytearray]] = []
        #: numbers of frames by their digests
        self._stored: dict[bytes, int] = {}
        #: those of the base, by their digests
        self._of_base: dict[bytes, int] = {}
        #: and the numbers that they have here
        self._imported: dict[int, int] = {}
        #: of frames that turned out to be equal to others, the number of the other
        self._equal: dict[int, int] = {}
        self._counts = [0, 0, 0]
        self._packers: list[_native.Packer] = []
        self._began = time.monotonic()
        if self._base is not None:
            self._of_base = {self._base.digest(frame): frame for frame in range(self._base.frames)}

    async def take(self, source: Source, sparse: bool, on_progress: Callable[[int], None]) -> None:
        pages = source.region.pages
        for first in range(0, pages, FRAME_PAGES):
            run = Run(first, min(FRAME_PAGES, pages - first))
            slot = memoryview(bytearray(run.count * PAGE))
            if not await source.read_into(run, slot):
                self._add(run, slot, [(_SAME if sparse else _ZERO, 0, run.count)])
            elif sparse:
                self._add(run, slot, list(_sparse_marks(slot, run, source.is_hole)))
            else:
                if self._base_memory is not None:
                    await self._base_memory.fetch(run.first * PAGE, len(slot))
                self._add(run, slot, await trio.to_thread.run_sync(self._mark, run, slot))
            if len(self._waiting) >= _MOST_WAITING:
                await self._store()
            on_progress(run.end)
        self._close_frame()
        await self._store()

    # ---- what has to be stored ----

    def _mark(self, run: Run, slot: memoryview) -> list[Mark]:
        """Stretches of ``slot``, which is ``run``: each a mark, its first page in the slot, and
        how many."""
        base = None
        if self._base_memory is not None:
            base = bytearray(len(slot))
            if not self._base_memory.is_hole(run.first * PAGE, len(slot)):
                self._base_memory.read(run.first * PAGE, memoryview(base))
            self._base_memory.forget(run.end * PAGE)
        return list(_marks(slot, base))

    def _add(self, run: Run, slot: memoryview, marks: list[Mark]) -> None:
        # The new pages of a slot are in one frame.
        if len(self._open) // PAGE + sum(n for mark, _, n in marks if mark == _NEW) > FRAME_PAGES:
            self._close_frame()
        for mark, first, count in marks:
            self._counts[mark] += count
            if mark == _ZERO:
                self._tables.add_run(count, ZERO_FRAME, 0)
            elif mark == _SAME:
                self._add_same(run.first + first, count)
            else:
                self._add_new(slot[first * PAGE : (first + count) * PAGE])

    def _add_same(self, first: int, count: int) -> None:
        assert self._base is not None
        for stretch in self._base.stretches(first, count):
            frame = stretch.frame
            number = ZERO_FRAME if frame == ZERO_FRAME else self._import(frame)
            self._tables.add_run(stretch.pages, number, stretch.at)

    def _import(self, frame: int) -> int:
        """The number that a frame of the base has here."""
        assert self._base is not None
        if frame not in self._imported:
            found = self._base.frame(frame)
            columns = self._base.columns
            object_ = self._number_of(
                found.object, columns.object_sizes[columns.frame_objects[frame]]
            )
            self._imported[frame] = self._tables.add_frame(
                object_, found.offset, found.length, found.pages, found.digest
            )
        return self._imported[frame]

    def _number_of(self, object_: str, size: int) -> int:
        if object_ not in self._numbers:
            self._numbers[object_] = self._tables.add_object(object_, size)
        return self._numbers[object_]

    def _add_new(self, pages: memoryview) -> None:
        if not self._open:
            # where it is stored is set once it is
            self._open_number = self._tables.add_frame(0, 0, 0, 0, bytes(DIGEST_SIZE))
        self._tables.add_run(len(pages) // PAGE, self._open_number, len(self._open) // PAGE)
        self._open += pages

    def _close_frame(self) -> None:
        if self._open:
            self._waiting.append((self._open_number, self._open))
            self._open = bytearray()

    # ---- storing ----

    async def _store(self) -> None:
        packed: dict[int, tuple[bytes, bytes]] = {}

        def pack(waiting: tuple[int, bytearray]) -> None:
            number, pages = waiting
            packed[number] = self._pack(memoryview(pages))

        await in_threads(pack, self._waiting)
        for number, pages in self._waiting:
            digest, stored = packed[number]
            if digest in self._stored:
                self._equal[number] = self._stored[digest]
            elif digest in self._of_base:
                self._equal[number] = self._import(self._of_base[digest])
            else:
                self._stored[digest] = number
                await self._write(number, len(pages) // PAGE, digest, stored)
        self._waiting.clear()

    def _pack(self, pages: memoryview) -> tuple[bytes, bytes]:
        """The digest, and the pages as they are stored: nothing if they are stored already."""
        digest = digest_of(pages)
        if digest in self._stored or digest in self._of_base:
            return digest, b""
        packer = self._packers.pop() if self._packers else _native.Packer()
        stored = store_piece(packer, pages)
        self._packers.append(packer)
        return digest, stored

    async def _write(self, number: int, pages: int, digest: bytes, stored: bytes) -> None:
        tables = self._tables
        name, tables.frame_offsets[number] = await self._sink.append(stored)
        object_ = tables.frame_objects[number] = self._number_of(name, 0)
        tables.object_sizes[object_] = self._sink.sizes[name]
        tables.frame_lengths[number] = len(stored)
        tables.frame_pages[number] = pages
        tables.frame_digests[number * len(digest) : (number + 1) * len(digest)] = digest

    # ---- what the base has in small pieces ----

    async def merge(self) -> None:
        """Store anew what is left of small frames, if it has come to many of them.

        Each layer has one such frame at least, and each frame costs a read. So as many as
        ``_MOST_SMALL`` are read at most, however many layers there are, and a page is stored twice
        at most while the frames that it comes in are small.
        """
        small = self._small_frames()
        if len(small) <= _MOST_SMALL:
            return
        old = self._tables.take_runs()
        assert self._snapshot is not None
        async with giving_up(self._snapshot.objects):
            kept = await trio.to_thread.run_sync(self._read_used, small, old)
        for pages, frame, at in old:
            number = self._equal.get(frame, frame)
            if number not in small:
                self._tables.add_run(pages, frame, at)
                continue
            if len(self._open) // PAGE + pages > FRAME_PAGES:
                self._close_frame()
            for page in range(at, at + pages):
                self._add_new(memoryview(kept[number, page]))
        self._close_frame()
        await self._store()

    def _small_frames(self) -> dict[int, int]:
        """Frames of the base of which few pages are used here, and their numbers there."""
        used: Counter[int] = Counter()
        for pages, frame in zip(self._tables.run_starts, self._tables.run_frames, strict=True):
            used[self._equal.get(frame, frame)] += pages
        found = (
            (number, frame)
            for frame, number in self._imported.items()
            if used[number] <= _SMALL_PAGES
        )
        return dict(islice(found, _MOST_MERGED))

    def _read_used(self, small: dict[int, int], runs: list[Mark]) -> dict[tuple[int, int], bytes]:
        """Their pages that are used, by frame and page in it."""
        wanted: dict[int, set[int]] = {number: set() for number in small}
        for pages, frame, at in runs:
            number = self._equal.get(frame, frame)
            if number in small:
                wanted[number].update(range(at, at + pages))
        kept: dict[tuple[int, int], bytes] = {}
        assert self._base_memory is not None
        for number, frame in small.items():
            found = self._base_memory.pages_of(frame, sorted(wanted[number]))
            kept.update(((number, page), content) for page, content in found.items())
        return kept

    # ---- the end ----

    async def commit(self) -> Created:
        """Store the index, after the objects that it needs."""
        tables = _renumbered(self._tables, self._equal)
        layers = 1 + (self._base.layers if self._base else 0)
        id_ = secrets.token_bytes(16)
        index = encode_index(id_, self._base.id if self._base else bytes(16), layers, tables)
        await self._sink.commit(index)
        zero, same, new = self._counts
        return Created(
            id=id_.hex(),
            layers=layers,
            pages=tables.pages,
            zero=zero,
            same=same,
            new=new,
            frames=len(self._stored) + len(self._equal),
            equal=len(self._equal),
            runs=len(tables.run_frames),
            bytes=sum(self._sink.sizes.values()) + len(index),
            seconds=round(time.monotonic() - self._began, 3),
        )


def _marks(slot: memoryview, base: bytearray | None) -> Iterator[Mark]:
    for mark, first, count in _zero_marks(slot):
        if mark == _ZERO or base is None:
            yield mark, first, count
        else:
            yield from _compared(slot, base, first, first + count)


def _zero_marks(slot: memoryview) -> Iterator[Mark]:
    done, pages = 0, len(slot) // PAGE
    while done < pages:
        count, zero = _native.leading_alike(slot[done * PAGE :], pages - done, PAGE)
        yield _ZERO if zero else _NEW, done, count
        done += count


def _compared(slot: memoryview, base: bytearray, first: int, end: int) -> Iterator[Mark]:
    pages = bytes(slot[first * PAGE : end * PAGE])  # memoryviews compare byte by byte

    def mark(page: int) -> int:
        at = (page - first) * PAGE
        return _SAME if pages[at : at + PAGE] == base[page * PAGE : (page + 1) * PAGE] else _NEW

    yield from _alike(mark, first, end)


def _sparse_marks(slot: memoryview, run: Run, is_hole: Callable[[Run], bool]) -> Iterator[Mark]:
    def is_same(page: int) -> bool:
        return is_hole(Run(run.first + page, 1))

    for same, first, count in _alike(is_same, 0, run.count):
        if same:
            yield _SAME, first, count
        else:
            part = slot[first * PAGE : (first + count) * PAGE]
            yield from ((mark, first + page, n) for mark, page, n in _zero_marks(part))


def _alike(of: Callable[[int], int], first: int, end: int) -> Iterator[Mark]:
    """Stretches of pages of which ``of`` returns the same."""
    for found, group in groupby(range(first, end), of):
        numbers = list(group)
        yield found, numbers[0], len(numbers)


def _renumbered(tables: Tables, equal: dict[int, int]) -> Tables:
    """The same, with frames numbered in the order of their first use, and without those that are
    equal to others."""
    result = Tables(object_names=tables.object_names, object_sizes=tables.object_sizes)
    numbers: dict[int, int] = {ZERO_FRAME: ZERO_FRAME}
    for count, frame, at in zip(tables.run_starts, tables.run_frames, tables.run_at, strict=True):
        old = equal.get(frame, frame)
        if old not in numbers:
            numbers[old] = result.add_frame(
                tables.frame_objects[old],
                tables.frame_offsets[old],
                tables.frame_lengths[old],
                tables.frame_pages[old],
                bytes(tables.frame_digests[old * DIGEST_SIZE : (old + 1) * DIGEST_SIZE]),
            )
        result.add_run(count, numbers[old], at)
    return result
