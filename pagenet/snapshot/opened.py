"""A snapshot that is open: its index, and its frames as they are read."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Self, TypeVar

import trio

from .. import _native
from ..errors import SourceLost, UsageError
from ..nurseries import open_failing_nursery
from ..protocol import printable
from .index import DIGEST_SIZE, PAGE, Index, decode_index
from .objects import STORE_TIMEOUT, Objects, giving_up, locate, open_objects
from .pieces import restore_piece

__all__ = [
    "WORKERS",
    "Snapshot",
    "digest_of",
    "in_threads",
    "open_snapshot",
    "open_snapshot_in_thread",
]

T = TypeVar("T")

#: threads that pack or unpack frames at a time; each has a few MiB
WORKERS = 4
# Those that wait for a store, most of the time: as many as pagenet.objects has requests in flight.
_STORE_WORKERS = 16
# of 2 MiB each, kept to be used again: fresh memory costs as much as unpacking into it
_KEPT_BUFFERS = WORKERS


def digest_of(pages: memoryview) -> bytes:
    """By which equal frames are known."""
    return hashlib.sha256(pages).digest()[:DIGEST_SIZE]


class Snapshot:
    """A snapshot that is open. Any thread may read its frames. Close it, or use it as a context
    manager."""

    def __init__(self, name: str, index: Index, objects: Objects) -> None:
        self.name, self.index = name, index
        self.objects = objects
        self._buffers: list[bytearray] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self.objects.close()

    def unpacked_into(self, file: int, place: str, is_brought: bool) -> _native.Frames:
        """Its frames, unpacked into a file of its size, which is in ``place``, as they are needed,
        or (``is_brought``) as somebody brings them. It is to be closed before the snapshot is."""
        index = self.index
        return _native.Frames(
            index.pages,
            index.columns,
            index.names,
            -1 if is_brought else self.objects.fd,
            file,
            printable(self.name),
            printable(place),
        )

    @property
    def identity(self) -> str:
        """What distinguishes its content from that of any other snapshot."""
        return f"snapshot {self.index.id.hex()}"

    def read_frame(self, number: int, use: Callable[[memoryview], T]) -> T:
        """What ``use`` returns for the pages of a frame, which are valid until then.

        Blocks: call it in a thread. :exc:`SourceLost`, in one line, if they are not there, or not
        what was written.
        """
        frame = self.index.frame(number)
        stored = self._read(frame.object, frame.offset, frame.length)
        buffer = self._buffers.pop() if self._buffers else bytearray()
        if len(buffer) < frame.pages * PAGE:
            buffer = bytearray(frame.pages * PAGE)
        with memoryview(buffer)[: frame.pages * PAGE] as pages:
            if not restore_piece(memoryview(stored), pages):
                end = frame.offset + frame.length
                raise self.lost(
                    f"bytes {frame.offset} to {end} of object {frame.object} are not what was"
                    " written"
                )
            result = use(pages)
        if len(self._buffers) < _KEPT_BUFFERS:
            self._buffers.append(buffer)
        return result

    async def each_frame(
        self, work: Callable[[int], None], on_done: Callable[[int], None] = lambda frame: None
    ) -> None:
        """Call ``work`` with the number of each frame, in several threads: see
        :func:`in_threads`."""
        workers = WORKERS if self.objects.fd >= 0 else _STORE_WORKERS
        async with giving_up(self.objects):
            await in_threads(work, range(self.index.frames), on_done, workers)

    def _read(self, object_: str, offset: int, length: int) -> bytes:
        try:
            stored = self.objects.read(object_, offset, length)
        except FileNotFoundError:
            raise self.lost(f"object {object_} is missing") from None
        except OSError as error:
            raise self.lost(f"object {object_}: {error.strerror}") from None
        except UsageError as error:  # the store refuses it, and did not refuse the index
            raise self.lost(str(error)) from None
        if len(stored) != length:
            raise self.lost(f"object {object_} ends at byte {offset + len(stored)}")
        return stored

    def lost(self, why: str | None) -> SourceLost:
        return SourceLost(f"snapshot {self.name} cannot be read: {why}")


def open_snapshot(spec: str, deadline: float = STORE_TIMEOUT) -> Snapshot:
    """Open the snapshot ``DIR/NAME`` or ``s3://BUCKET/PREFIX/NAME``. Blocks, for a store at most
    ``deadline`` seconds. :exc:`UsageError`, in one line, if it cannot be used;
    :exc:`~pagenet.errors.SourceUnreachable` if its store does not answer."""
    where, name = locate(spec)
    with ExitStack() as undo:
        objects = open_objects(where, deadline)
        undo.callback(objects.close)
        index = _read_index(objects, name, spec)
        undo.pop_all()
    return Snapshot(spec, index, objects)


async def open_snapshot_in_thread(spec: str, deadline: float = STORE_TIMEOUT) -> Snapshot:
    """:func:`open_snapshot`, which may be cancelled while it waits for a store."""
    where, name = locate(spec)
    with ExitStack() as undo:
        objects = open_objects(where, deadline)
        undo.callback(objects.close)
        async with giving_up(objects):
            index = await trio.to_thread.run_sync(_read_index, objects, name, spec)
        undo.pop_all()
    return Snapshot(spec, index, objects)


def _read_index(objects: Objects, name: str, spec: str) -> Index:
    try:
        return decode_index(partial(objects.read, name), spec)
    except OSError as error:
        raise UsageError(f"cannot open snapshot {spec}: {error.strerror}") from None


async def in_threads(
    work: Callable[[T], None],
    items: Iterable[T],
    on_done: Callable[[T], None] = lambda item: None,
    workers: int = WORKERS,
) -> None:
    """Call ``work`` with each item, in ``workers`` threads, and ``on_done`` after it, in the same
    thread, but never in two at a time. The first error ends it."""
    left, lock = iter(items), threading.Lock()

    def take() -> list[T]:
        with lock:
            return list(islice(left, 1))

    def run() -> None:
        while taken := take():
            trio.from_thread.check_cancelled()
            work(taken[0])
            with lock:
                on_done(taken[0])

    limiter = trio.CapacityLimiter(workers)
    async with open_failing_nursery() as nursery:
        for _ in range(workers):
            nursery.start_soon(partial(trio.to_thread.run_sync, run, limiter=limiter))
