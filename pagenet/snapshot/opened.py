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
from .objects import Objects, locate, open_objects
from .pieces import restore_piece

__all__ = ["WORKERS", "Snapshot", "digest_of", "in_threads", "open_snapshot"]

T = TypeVar("T")

#: threads that pack or unpack frames at a time; each has a few MiB
WORKERS = 4
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
        self._objects = objects
        self._buffers: list[bytearray] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._objects.close()

    def unpacked_into(self, file: int, place: str) -> _native.Frames:
        """Its frames, unpacked into a file of its size, which is in ``place``, as they are needed.
        It is to be closed before the snapshot is."""
        index = self.index
        return _native.Frames(
            index.pages,
            index.columns,
            index.names,
            self._objects.fd,
            file,
            printable(self.name),
            printable(place),
        )

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

    def _read(self, object_: str, offset: int, length: int) -> bytes:
        try:
            stored = self._objects.read(object_, offset, length)
        except FileNotFoundError:
            raise self.lost(f"object {object_} is missing") from None
        except OSError as error:
            raise self.lost(f"object {object_}: {error.strerror}") from None
        if len(stored) != length:
            raise self.lost(f"object {object_} ends at byte {offset + len(stored)}")
        return stored

    def lost(self, why: str | None) -> SourceLost:
        return SourceLost(f"snapshot {self.name} cannot be read: {why}")


def open_snapshot(spec: str) -> Snapshot:
    """Open the snapshot ``DIR/NAME``. Blocks. :exc:`UsageError`, in one line, if it cannot be
    used."""
    directory, name = locate(spec)
    with ExitStack() as undo:
        objects = open_objects(directory)
        undo.callback(objects.close)
        try:
            index = decode_index(partial(objects.read, name), spec)
        except OSError as error:
            raise UsageError(f"cannot open snapshot {spec}: {error.strerror}") from None
        undo.pop_all()
    return Snapshot(spec, index, objects)


async def in_threads(
    work: Callable[[T], None], items: Iterable[T], on_done: Callable[[T], None] = lambda item: None
) -> None:
    """Call ``work`` with each item, in ``WORKERS`` threads, and ``on_done`` after it, in the same
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

    limiter = trio.CapacityLimiter(WORKERS)
    async with open_failing_nursery() as nursery:
        for _ in range(WORKERS):
            nursery.start_soon(partial(trio.to_thread.run_sync, run, limiter=limiter))
